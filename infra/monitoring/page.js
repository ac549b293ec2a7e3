"use strict";

// The page. Nothing here decides whether it is safe: /api/status says so.

const HOUR = 3600e3, EVERY = 3000;
const MARKS = { safe: "✓", lagging: "…", at_risk: "!", unsafe: "✕", unknown: "?" };
const RANGES = [
  ["All", 0], ["30 d", 720 * HOUR], ["7 d", 168 * HOUR], ["1 d", 24 * HOUR], ["1 h", HOUR], ["10 min", HOUR / 6],
];

const $ = id => document.getElementById(id);
const chosen = { at: null, timeline: null, shown: false };
let status = null, range = 0, unanswered = 0, copying = 0;

function html(name, text, attributes = {}) {
  const node = document.createElement(name);
  if (text !== undefined && text !== null) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function svg(name, attributes = {}, text) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function hatch(root) {
  const pattern = svg("pattern", { id: "hatch", width: 7, height: 7, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" });
  pattern.append(svg("line", { x1: 0, y1: 0, x2: 0, y2: 7, class: "hatch" }));
  const defs = svg("defs");
  defs.append(pattern);
  root.append(defs);
}

function showVerdict() {
  const silent = unanswered > 1;  // one lost answer is no outage
  const state = silent || !status ? "unknown" : status.state;
  $("verdict").className = state;
  $("mark").textContent = MARKS[state] || "?";
  const words = silent ? "Not known: the service does not answer." : status ? status.sentence : null;
  if (words && $("sentence").textContent !== words) $("sentence").textContent = words;
  const exposed = !silent && status && status.exposed ? `${status.exposed.fact}: ${status.exposed.hint}.` : "";
  $("exposed").hidden = !exposed;
  if ($("exposed").textContent !== exposed) $("exposed").textContent = exposed;
  const listed = status && status.listed ? `; the destinations were listed at ${utc(Date.parse(status.listed)).slice(11, 19)}` : "";
  if (status) $("when").textContent = `As of ${utc(Date.parse(status.now)).slice(0, 19)} UTC${listed}`;
  document.title = `${MARKS[state]} walship`;
}

function fill(list, lines) {
  const old = [...list.children].map(item => item.textContent);
  if (old.join("\n") !== lines.join("\n")) list.replaceChildren(...lines.map(line => html("li", line)));
}

function plot(history, place, width) {
  const column = history.destinations.indexOf(place.name) + 1, height = 72, base = height - 16, left = 46;
  const live = [Date.parse(status.now) / 1000];
  if (column) live[column] = place.lag_seconds;
  const lines = column ? pieces([...history.samples, live], column) : [];
  const lags = lines.flat().map(point => point[1]);
  const most = Math.max(2, ...lags), now = Date.parse(status.now);
  const x = ms => left + (width - left - 2) * (1 - Math.min(1, Math.max(0, (now - ms) / HOUR)));
  const y = lag => base - (base - 8) * lag / most;
  const said = lags.length ? `highest ${span(Math.max(...lags))}` : "nothing is known yet";
  const root = svg("svg", { class: "plot", viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": `Lag in the last hour: ${said}` });
  hatch(root);
  for (const lag of [0, most]) {
    root.append(svg("line", { class: "grid", x1: left, x2: width, y1: y(lag), y2: y(lag) }));
    root.append(svg("text", { x: left - 6, y: y(lag) + 4, "text-anchor": "end" }, lag ? span(lag) : "0 s"));
  }
  let known = now - HOUR;  // hatched: no sample
  for (const line of [...lines, [[now, 0]]]) {
    if (line[0][0] - known > 35e3) {
      root.append(svg("rect", { class: "dark", x: x(known), y: 8, width: Math.max(0, x(line[0][0]) - x(known)), height: base - 8 }));
    }
    known = line[line.length - 1][0];
  }
  for (const line of lines) {
    const points = line.map(([ms, lag]) => `${x(ms).toFixed(1)},${y(lag).toFixed(1)}`);
    if (points.length === 1) points.push(`${x(line[0][0]) + 2},${y(line[0][1]).toFixed(1)}`);
    root.append(svg("polyline", { class: "lag", points: points.join(" ") }));
  }
  root.append(svg("text", { x: left, y: height - 3 }, "1 h ago"), svg("text", { x: width, y: height - 3, "text-anchor": "end" }, "now"));
  return root;
}

function showDestinations() {
  const places = (status.destinations || []).map(place => {
    const box = html("div", null, { class: "place" });
    box.append(html("h3", place.name + (place.required ? "" : " (not required)")));
    const behind = place.lag_seconds === null ? `behind by ${bytes(place.lag_bytes)}`
      : place.lag_seconds < 0.05 ? "has everything" : `behind by ${span(place.lag_seconds)}`;
    const state = place.error ? "✕ does not answer" : place.missing ? "✕ has a hole" : behind;
    box.append(html("div", state, { class: "now" }));
    const wrong = [place.error, place.missing && `${place.missing} is missing`, place.late, ...place.problems].filter(Boolean);
    for (const line of wrong) box.append(html("p", `! ${line}`, { class: "wrong" }));
    box.append(plot(status.lag_history, place, Math.max(240, $("destinations").clientWidth - 28)));
    const end = place.durable_lsn ? `WAL up to LSN ${place.durable_lsn}` : "no WAL yet";
    const copies = place.backups === 1 ? "1 base backup" : `${place.backups} base backups`;
    box.append(html("p", `${end}, ${copies}. Hatched: not known.`, { class: "quiet" }));
    return box;
  });
  if (places.length) $("destinations").replaceChildren(...places);
}

// -- the time line

function extent() {
  const now = Date.parse(status.now), first = Date.parse(status.recoverable.first);
  const whole = Math.max(now - first, 10e3) * 1.03;
  return [now - (range && range < whole ? range : whole), now];
}

const lanes = () => [...new Set(status.recoverable.stretches.map(each => each.timeline))].sort((a, b) => b - a);
const ROW = 34, TOP = 20, SIDE = 8;

function showRanges() {
  const whole = Date.parse(status.now) - Date.parse(status.recoverable.first);
  const wanted = RANGES.filter(([, length]) => length < whole);
  const box = $("ranges");
  box.hidden = wanted.length < 2;
  if (box.childElementCount !== wanted.length) {
    box.replaceChildren(...wanted.map(([words, length]) => {
      const button = html("button", words, { type: "button", "data-length": length });
      button.addEventListener("click", () => { range = length; showLine(); });
      return button;
    }));
  }
  for (const button of box.children) button.setAttribute("aria-pressed", String(Number(button.dataset.length) === range));
}

function showLine() {
  const stored = status.recoverable, box = $("line");
  for (const id of ["line", "line-help", "legend", "exactly"]) $(id).hidden = !stored.stretches.length;
  if (!stored.stretches.length) {
    $("command").hidden = $("ranges").hidden = true;
    return;
  }
  showRanges();
  const [from, to] = extent(), rows = lanes(), width = Math.max(240, box.clientWidth - 2), height = TOP + rows.length * ROW + 22;
  const x = ms => SIDE + (width - 2 * SIDE) * Math.min(1, Math.max(0, (ms - from) / (to - from)));
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, height, "aria-hidden": "true" });
  hatch(root);
  for (const [at, words] of ticks(from, to, Math.floor(width / 80))) {
    root.append(svg("line", { class: "grid", x1: x(at), x2: x(at), y1: TOP - 2, y2: height - 18 }));
    if (x(at) > 24 && x(at) < width - 70) root.append(svg("text", { x: x(at), y: height - 5, "text-anchor": "middle" }, words));
  }
  rows.forEach((timeline, row) => {
    const y = TOP + row * ROW, origin = stored.timelines.find(each => each.timeline === timeline);
    const parent = origin && origin.parent ? `, from ${origin.parent} at ${origin.fork_lsn}` : "";
    root.append(svg("text", { x: SIDE, y: y - 5 }, `timeline ${timeline}${parent}`));
    const own = stored.stretches.filter(each => each.timeline === timeline);
    own.forEach((each, index) => {
      const begins = Date.parse(each.begins), ends = each.ends ? Date.parse(each.ends) : each.ended_by === "open" ? to : begins;
      if (ends >= from) root.append(svg("rect", { class: "covered", x: x(begins), y, width: Math.max(3, x(ends) - x(begins)), height: 14 }));
      if (each.tail_bytes && each.ended_by === "open") root.append(svg("rect", { class: "tail", x: x(ends) - 6, y, width: 6, height: 14 }));
      const next = own[index + 1] ? Date.parse(own[index + 1].begins) : to;
      if (each.ended_by === "hole" && next > from) {
        root.append(svg("rect", { class: "dark", x: x(ends), y, width: Math.max(3, x(next) - x(ends)), height: 14 }));
        root.append(svg("text", { x: (x(ends) + x(next)) / 2, y: y + 26, "text-anchor": "middle" }, "✕ hole"));
      }
    });
    for (const backup of stored.backups) {
      const at = Date.parse(backup.stopped);
      if (backup.timeline !== timeline || at < from) continue;
      const mark = svg("path", { class: "backup", d: `M${x(at)} ${y + 6} l6 12 h-12 z` });
      mark.append(svg("title", {}, `${backup.name}, ${bytes(backup.size)}`));
      root.append(mark);
    }
  });
  root.append(svg("text", { x: width - SIDE, y: height - 5, "text-anchor": "end" }, "now (UTC)"));
  if (chosen.at !== null && chosen.at >= from) {
    root.append(svg("line", { class: "chosen", x1: x(chosen.at), x2: x(chosen.at), y1: 4, y2: height - 20 }));
    root.append(svg("circle", { class: "chosen-head", cx: x(chosen.at), cy: 5, r: 5 }));
  }
  box.replaceChildren(root);
  describe();
}

function describe() {
  const [from, to] = extent(), at = chosen.at === null ? to : chosen.at, timeline = chosen.timeline || status.recoverable.newest_timeline;
  const box = $("line"), can = stretchAt(status, timeline, at) ? "can be restored" : "cannot be restored";
  box.setAttribute("aria-valuenow", String(Math.round(100 * Math.min(1, Math.max(0, (at - from) / (to - from))))));
  box.setAttribute("aria-valuetext", `${utc(Math.floor(at / 1000) * 1000)} UTC, timeline ${timeline}, ${can}`);
}

function choose(ms, timeline, show) {
  const now = Date.parse(status.now);
  chosen.at = Math.min(now, Math.max(Date.parse(status.recoverable.first), Math.floor(ms)));
  chosen.timeline = timeline || chosen.timeline || status.recoverable.newest_timeline;
  // As close as a finger or a key can be to it: the edge of what can be restored is meant.
  const [from, to] = extent(), near = (to - from) / 60;
  if (!stretchAt(status, chosen.timeline, chosen.at)) {
    const edges = status.recoverable.stretches.filter(each => each.timeline === chosen.timeline)
      .flatMap(each => { const [a, b] = bounds(each, now); return a <= b ? [a, b] : []; })
      .filter(edge => Math.abs(edge - chosen.at) <= near)
      .sort((a, b) => Math.abs(a - chosen.at) - Math.abs(b - chosen.at));
    if (edges.length) chosen.at = edges[0];
  }
  const stretch = stretchAt(status, chosen.timeline, chosen.at);
  if (stretch) chosen.at = handy(stretch, chosen.at, now);
  $("moment").value = utc(chosen.at);
  showLine();
  if (show || chosen.shown) showCommand();
}

function showCommand() {
  chosen.shown = true;
  const stretch = stretchAt(status, chosen.timeline, chosen.at), moment = `${utc(chosen.at)} UTC`;
  const pre = $("command-line").parentElement;
  $("command").hidden = false;
  pre.hidden = $("copy").hidden = !stretch;
  if (stretch) {
    $("command-words").textContent = `This restores ${moment}, on any machine that has the settings and the server's programs, into an empty folder:`;
    $("command-line").textContent = commandFor(status, chosen.timeline, chosen.at);
  } else {
    const behind = status.recoverable.stretches.find(each => each.timeline === chosen.timeline && each.missing && Date.parse(each.ends || each.begins) <= chosen.at);
    $("command-words").textContent = `✕ ${moment} cannot be restored` + (behind ? `: segment ${behind.missing} is missing.` : ` on timeline ${chosen.timeline}.`);
  }
}

function onLine(event) {
  const box = $("line").getBoundingClientRect(), [from, to] = extent(), rows = lanes();
  const share = (event.clientX - box.left - SIDE) / (box.width - 2 * SIDE);
  const row = Math.floor((event.clientY - box.top - TOP + 10) / ROW);
  choose(from + (to - from) * Math.min(1, Math.max(0, share)), rows[Math.min(rows.length - 1, Math.max(0, row))], true);
}

function onKey(event) {
  const [from, to] = extent(), rows = lanes(), at = chosen.at === null ? to : chosen.at;
  const steps = { ArrowLeft: -1 / 200, ArrowRight: 1 / 200, PageDown: -1 / 20, PageUp: 1 / 20 };
  const row = rows.indexOf(chosen.timeline || status.recoverable.newest_timeline);
  if (event.key in steps) choose(at + steps[event.key] * (to - from));
  else if (event.key === "Home") choose(from);
  else if (event.key === "End") choose(to);
  else if (event.key === "ArrowUp") choose(at, rows[Math.max(0, row - 1)]);
  else if (event.key === "ArrowDown") choose(at, rows[Math.min(rows.length - 1, row + 1)]);
  else if (event.key === "Enter" || event.key === " ") choose(at, null, true);
  else return;
  event.preventDefault();
}

function showRest() {
  const stored = status.recoverable, facts = [];
  if (stored) {
    const newest = stored.stretches.filter(each => each.timeline === stored.newest_timeline).pop();
    const tail = newest && newest.tail_bytes ? ` The last ${bytes(newest.tail_bytes)} are in tails of the open segment.` : "";
    $("back-words").textContent = newest
      ? `Any moment from ${utc(Date.parse(newest.begins)).slice(0, 19)} to ${newest.ends ? utc(Date.parse(newest.ends)).slice(0, 19) : "a time that is not known"} UTC.${tail}`
      : "✕ Nothing: there is no base backup with the WAL that it needs. Take one: walship backup";
    fill($("holes"), stored.holes.map(hole => `✕ Hole on timeline ${hole.timeline}: ${missing(hole)}`));
    const table = html("table"), head = html("tr");
    for (const name of ["Name", "Ended (UTC)", "Size", "Stored", "Timeline", "At"]) head.append(html("th", name, { scope: "col" }));
    table.append(head, ...stored.backups.slice(-30).reverse().map(backup => {
      const row = html("tr");
      for (const cell of [backup.name, utc(Date.parse(backup.stopped)).slice(0, 19), bytes(backup.size), bytes(backup.stored_size),
        backup.timeline, backup.destinations.join(", ")]) row.append(html("td", cell));
      return row;
    }));
    $("backups").replaceChildren(stored.backups.length ? table : html("p", "None yet: walship backup takes one.", { class: "quiet" }));
  }
  const when = moment => moment ? `${utc(Date.parse(moment)).slice(0, 19)} UTC` : "never, as far as is known";
  facts.push(["Last drill", when(status.last_drill)], ["Last verify", when(status.last_verify)]);
  for (const { job, next, running } of status.schedule || []) {
    const what = job === "full" || job === "incremental" ? `${job} backup` : job;
    const due = next && Date.parse(next) <= Date.parse(status.now);
    facts.push([`Next ${what}`, running ? "running now" : !next ? "never" : `${when(next)}${due ? ", and is due" : ""}`]);
  }
  facts.push(["Cluster", status.system_id || "not known"], ["Server", status.server_error || (status.current_lsn ? `WAL written to ${status.current_lsn}` : "not known")]);
  if (status.stream) facts.push(["Stream", status.stream.problem || `streams from the slot ${status.stream.slot}`], ["Commits", status.stream.commits.replace(/^commits /, "")]);
  if (status.spool) facts.push(["Spool", `${status.spool.files} files wait (${bytes(status.spool.bytes)}), ${bytes(status.spool.free_bytes)} are free`]);
  facts.push(["walship", status.version]);
  $("facts").replaceChildren(...facts.flatMap(([name, value]) => [html("dt", name), html("dd", value)]));
}

function show() {
  showVerdict();
  const reasons = [...(status.reasons || []), ...(status.unknown || [])];
  $("why").hidden = !reasons.length;
  fill($("reasons"), reasons);
  $("first").hidden = !(status.hints || []).length;
  fill($("hints"), status.hints || []);
  showDestinations();
  if (status.recoverable) showLine();
  if (status.recoverable && status.recoverable.stretches.length && chosen.shown) showCommand();
  showRest();
}

async function look() {
  try {
    // A service that hangs must not leave the page as it was.
    const answer = await fetch("/api/status", { cache: "no-store", signal: AbortSignal.timeout(5000) });
    if (!answer.ok) throw new Error(String(answer.status));
    status = await answer.json();
    unanswered = 0;
  } catch {
    unanswered += 1;
  }
  if (status) show(); else showVerdict();
}

async function keepLooking() {
  if (!document.hidden) await look();
  setTimeout(keepLooking, unanswered ? 1000 : EVERY);
}

function begin() {
  const key = (kind, words) => {
    const item = html("li"), root = svg("svg", { viewBox: "0 0 22 13", "aria-hidden": "true" });
    root.append(kind === "backup" ? svg("path", { class: kind, d: "M11 0 l6 12 h-12 z" }) : svg("rect", { class: kind, width: 22, height: 13 }));
    item.append(root, words);
    return item;
  };
  $("legend").append(key("covered", "can be restored"), key("tail", "newest, in tails"), key("backup", "base backup"), key("dark", "cannot: WAL is missing"));
  $("line").addEventListener("click", onLine);
  $("line").addEventListener("keydown", onKey);
  $("exactly").addEventListener("submit", event => {
    event.preventDefault();
    const ms = parseMoment($("moment").value);
    $("moment-wrong").textContent = Number.isNaN(ms) ? "Write it as 2026-11-23 12:00:00" : "";
    if (!Number.isNaN(ms)) choose(ms, null, true);
  });
  $("copy").addEventListener("click", async () => {
    let done = false;
    try { await navigator.clipboard.writeText($("command-line").textContent); done = true; } catch {
      getSelection().selectAllChildren($("command-line"));  // without https, browsers may not copy by themselves
      done = document.execCommand("copy");
    }
    $("copied").textContent = done ? "Copied." : "It is selected: copy it with Ctrl+C.";
    clearTimeout(copying);
    copying = setTimeout(() => { $("copied").textContent = ""; }, 4000);
  });
  addEventListener("resize", () => { if (status) show(); });
  keepLooking();
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
}

begin();
