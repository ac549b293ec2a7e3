#!/bin/sh
# For the image's /docker-entrypoint-initdb.d: a new cluster archives into the folder that walship reads, and remembers
# which blocks have changed, for `walship backup --incremental` (PostgreSQL 17 and later). In the cluster's own
# configuration, where a restore finds the archiving and switches it off.
set -eu
cat >>"$PGDATA/postgresql.conf" <<'END'
wal_level = 'replica'
archive_mode = 'on'
archive_library = 'basic_archive'
basic_archive.archive_directory = '/spool'
archive_timeout = '60'
summarize_wal = 'on'
END
