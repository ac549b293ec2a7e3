"use strict";

// What needs no page: times, sizes, and which command restores which moment.

const pad = (number, digits = 2) => String(number).padStart(digits, "0");

function utc(ms, exact) {
  const d = new Date(ms);
  const rest = exact || ms % 1000 ? "." + pad(d.getUTCMilliseconds(), 3) : "";
  return `${d.getUTCFullYear()}-${pad(d.getUTCMonth() + 1)}-${pad(d.getUTCDate())} ` +
    `${pad(d.getUTCHours())}:${pad(d.getUTCMinutes())}:${pad(d.getUTCSeconds())}${rest}`;
}

function span(seconds) {
  if (seconds === null) return "not known";
  if (seconds < 10) return `${seconds.toFixed(1)} s`;
  if (seconds < 120) return `${Math.round(seconds)} s`;
  if (seconds < 7200) return `${Math.round(seconds / 60)} min`;
  return seconds < 172800 ? `${Math.round(seconds / 3600)} h` : `${Math.round(seconds / 86400)} d`;
}

function bytes(size) {
  if (size === null) return "not known";
  const units = ["B", "KB", "MB", "GB", "TB"];
  let unit = 0;
  for (; size >= 1024 && unit < 4; unit++) size /= 1024;
  return `${unit ? size.toFixed(1) : size} ${units[unit]}`;
}

// First and last moment (ms) that a restore can be asked for; last < first if there is none between them.
// What ended once ends with a transaction: only a moment before it is known to be reached.
function bounds(stretch, now) {
  const first = Date.parse(stretch.begins) + (/\.\d{3}0*[1-9]/.test(stretch.begins) ? 1 : 0);
  if (stretch.ends === null) return [first, stretch.ended_by === "open" ? now : first - 1];
  const ends = Date.parse(stretch.ends);
  return [first, stretch.ended_by === "open" ? ends : ends - 1];
}

function stretchAt(status, timeline, ms) {
  const now = Date.parse(status.now);
  return status.recoverable.stretches.find(each => {
    const [first, last] = bounds(each, now);
    return each.timeline === timeline && first <= ms && ms <= last;
  });
}

// The moment itself, or its whole second if that can be restored as well.
function handy(stretch, ms, now) {
  const second = Math.floor(ms / 1000) * 1000;
  return second >= bounds(stretch, now)[0] ? second : ms;
}

function commandFor(status, timeline, ms) {
  const other = timeline === status.recoverable.newest_timeline ? "" : ` --timeline ${timeline}`;
  const cluster = status.cluster_option ? ` --cluster ${status.cluster_option}` : "";
  return `walship restore --target-dir /srv/restored --to-time '${utc(ms)}+00'${other}${cluster}`;
}

// "2026-11-23 12:00[:00[.5]]" → ms, or NaN.
function parseMoment(text) {
  const found = /^\s*(\d{4}-\d\d-\d\d)[ T](\d\d:\d\d)(:\d\d(\.\d{1,3})?)?\s*(UTC|Z|\+00(:?00)?)?\s*$/.exec(text);
  return found ? Date.parse(`${found[1]}T${found[2]}${found[3] || ":00"}Z`) : NaN;
}

// Samples → pieces of a line: [[[ms, seconds], …], …]; where nothing was known, or asked, it is broken.
function pieces(samples, column) {
  const lines = [];
  let line = null, before = 0;
  for (const sample of samples) {
    const at = sample[0] * 1000, lag = sample[column];
    if (lag === null || at - before > 35e3) line = null;
    if (lag !== null) {
      if (!line) lines.push(line = []);
      line.push([at, lag]);
    }
    before = at;
  }
  return lines;
}

// Moments for marks on the time line, at most `most`: [[ms, words], …].
function ticks(from, to, most) {
  const steps = [1, 5, 15, 60, 300, 900, 3600, 10800, 21600, 43200, 86400, 172800, 604800, 2592000, 31536000];
  const step = 1000 * (steps.find(each => (to - from) / 1000 / each <= most) || steps[steps.length - 1]);
  const found = [];
  for (let at = Math.ceil(from / step) * step; at <= to; at += step) {
    found.push([at, utc(at).slice(...(step < 60e3 ? [11, 19] : step < 86400e3 ? [11, 16] : [5, 10]))]);
  }
  return found;
}

function missing(hole) {
  return hole.segments === 1 ? `segment ${hole.first} is missing` : `${hole.segments} segments are missing, ${hole.first} to ${hole.last}`;
}
