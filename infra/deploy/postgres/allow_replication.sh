#!/bin/sh
# For the image's /docker-entrypoint-initdb.d: "host all all all" does not cover replication connections, and a base
# backup is one.
set -eu
echo "host replication all all scram-sha-256" >>"$PGDATA/pg_hba.conf"
