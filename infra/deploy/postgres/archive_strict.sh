#!/bin/sh
# An archive_command that returns only once the file is stored at every required destination:
#
#   archive_mode = on
#   archive_command = '/etc/walship/archive_strict.sh "%p" "%f" /var/spool/walship'
#
# pg_stat_archiver then counts what is safe, and pg_wal keeps what is not: nothing rests on the spool's disk, at the
# price of one upload per file, one after the other. (With basic_archive the spool is the queue, and drains faster.)
#
# It copies into the spool, synced, and waits until walship takes the file away, which it does for acknowledged files
# only. After WAIT seconds (the fourth argument, 60) it gives up with a message, and PostgreSQL calls it again: the file
# is still in the spool then, and what is waited for goes on. In POSIX sh; needs the sync of GNU coreutils or of busybox.
set -eu

path=$1 name=$2 spool=$3 wait=${4:-60}
file=$spool/$name

fail() {
    echo "archive_strict: $1" >&2
    exit 1
}

# How many files of that name were refused so far: walship moves what is not what its name says, and that is no success.
count_refused() { find "$spool/refused" -name "$name*" 2>/dev/null | wc -l; }

[ -d "$spool" ] || fail "there is no folder $spool"
before=$(count_refused)
if [ -e "$file" ]; then
    # An earlier call was interrupted, or has given up. Other bytes of that name are for people to look at. (Between the
    # two looks it may have been stored and removed.)
    cmp -s "$path" "$file" || [ ! -e "$file" ] || fail "$file is there with other bytes than $path"
else
    # The name of basic_archive's own temporary files: walship removes what a crash leaves of them.
    scratch=$spool/archtemp.$name.$$.0
    trap 'rm -f "$scratch"' EXIT
    trap 'exit 1' HUP INT TERM
    cp "$path" "$scratch"
    sync "$scratch"
    mv "$scratch" "$file"
    sync "$spool"
fi

turns=$((wait * 20))
while [ -e "$file" ]; do
    [ "$turns" -gt 0 ] || fail "$name is in $spool, and not yet stored everywhere: walship status tells why"
    turns=$((turns - 1))
    sleep 0.05 2>/dev/null || { sleep 1; turns=$((turns - 19)); }
done
[ "$(count_refused)" -eq "$before" ] || fail "walship has moved $name to $spool/refused: its log says why"
