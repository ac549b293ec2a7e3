#!/bin/sh
# For the image's /docker-entrypoint-initdb.d: a new cluster archives into the folder that walship reads. In the
# cluster's own configuration, where a restore finds it and switches it off.
set -eu
cat >>"$PGDATA/postgresql.conf" <<'END'
wal_level = 'replica'
archive_mode = 'on'
archive_library = 'basic_archive'
basic_archive.archive_directory = '/spool'
archive_timeout = '60'
END
