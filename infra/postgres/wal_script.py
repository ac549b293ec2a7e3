"""What stands in restore_command, and the sh script behind it.

To PostgreSQL every exit status of restore_command from 1 to 125 means "the WAL ends here, promote": a Python that
cannot import a module (1), an option it does not know (2), a script that cannot be opened (2 in dash), a full disk. So
"absent" is 44 until the very last step, where the line in restore_command, and nothing else, turns 44 into 1, leaves 0,
and makes 200 of all the rest, which stops recovery. The paths are relative: PostgreSQL runs it in the data directory,
wherever that is moved to.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from string import Template

#: Everything of ours in a data directory. BASE_BACKUP skips names that begin with ``pgsql_tmp`` at any level, so what
#: lies here (it can open the repository) gets into no later backup.
FOLDER = "pgsql_tmp.walship"
SCRIPT = "restore_wal.sh"
CONTEXT = "context.json"
FEED = "feed"

#: Reserved exit status of ``fetch-wal`` and of the script: the file is stored nowhere.
ABSENT = 44

#: The script runs in a subshell of the shell that PostgreSQL starts anyway: one program less for each segment. What
#: ends that subshell (a file that is not there, a syntax error) ends no more than it.
RESTORE_COMMAND = (
    f'set -- "%f" "%p"; (. ./{FOLDER}/{SCRIPT}); case $? in 0) exit 0 ;; {ABSENT}) exit 1 ;; *) exit 200 ;; esac'
)

_SCRIPT = Template("""\
# Written by walship restore: brings one WAL file to a recovering PostgreSQL, from the restore that still waits for the
# server (the feed), else from the repository. restore_command reads it in a subshell, with $$1 the file's name and $$2
# where to put it. Exit status: 0 it is there, whole; $absent it is stored nowhere; all else is an error.
# restore_command turns $absent into 1 and errors into 200: 1 to 125 would end recovery silently.
file=$$1
path=$$2
home=$folder
feed=$$home/$feed

whole() { # FILE: all of it is there
    bytes=$$(wc -c <"$$1") || return 1
    case $$file in
        *.history) [ "$$bytes" -gt 0 ] ;;
        *) [ "$$bytes" -eq $segment_size ] ;;
    esac
}

alive() { # the feed, and not another process that got its number
    { read -r pid began <"$$feed/pid"; } 2>/dev/null || return 1
    if [ -d /proc/self ]; then
        { read -r line <"/proc/$$pid/stat"; } 2>/dev/null || return 1
        set -- $${line##*) }
        [ "$${20}" = "$$began" ]
    else
        ps -p "$$pid" >/dev/null 2>&1
    fi
}

if alive; then
    # What stands in ready/ is whole: the feed has looked at its size, and renamed it there. So mv is the only program
    # that is started for a segment that was fetched ahead.
    [ ! -s "$$feed/ready/$$file" ] || exec mv -f "$$feed/ready/$$file" "$$path"
    rm -f "$$feed/absent/$$file" "$$feed/failed/$$file" || exit 200
    : >"$$feed/want/$$file" || exit 200
    while alive; do
        if [ -s "$$feed/ready/$$file" ]; then
            # In this order: whoever sees that the file was taken finds no request for it either.
            rm -f "$$feed/want/$$file"
            exec mv -f "$$feed/ready/$$file" "$$path"
        fi
        if [ -f "$$feed/absent/$$file" ]; then
            rm -f "$$feed/absent/$$file"
            exit $absent
        fi
        if [ -f "$$feed/failed/$$file" ]; then
            rm -f "$$feed/failed/$$file"
            echo "walship: $$file could not be fetched; the restore that serves it says why" >&2
            exit 200
        fi
        sleep 0.01 2>/dev/null || sleep 1
    done
fi

$fetch --context "$$home/$context" "$$file" "$$path"
status=$$?
case $$status in
    0)
        whole "$$path" && exit 0
        echo "walship: fetch-wal left no whole $$file at $$path" >&2
        exit 200
        ;;
    $absent) exit $absent ;;
esac
echo "walship: fetch-wal ended with status $$status for $$file; recovery stops rather than lose what follows" >&2
exit 200
""")


def script(fetch: Sequence[str], segment_size: int) -> str:
    """The script's text. ``fetch``: the command of ``fetch-wal``; ``--context FILE %f %p`` follow behind it."""
    return _SCRIPT.substitute(
        absent=ABSENT, folder=FOLDER, feed=FEED, context=CONTEXT, fetch=shlex.join(fetch), segment_size=segment_size
    )
