-- The role that walship connects as. As root, who need not be a role, and whose files the server's user cannot read:
--
--   read -rs POSTGRES_PASSWORD && export POSTGRES_PASSWORD      # typed, and shown nowhere
--   runuser -u postgres -- psql -v ON_ERROR_STOP=1 < role.sql
--
-- (or, where nobody else can list the processes, in one line with -v password='...'). The server's log has it in plain
-- if it logs statements. Later: \password walship, in psql, sends it only as the server keeps it.
--
-- It may be run again: a role that is there gets this password, and what it lacks.
--
-- pg_hba.conf has to let it in, for the database postgres and for replication:
--
--   host  postgres,replication  walship  10.0.0.5/32  scram-sha-256

\if :{?password}
\else
    \getenv password POSTGRES_PASSWORD
\endif
\if :{?password}
\else
    DO 'BEGIN RAISE ''no password: set POSTGRES_PASSWORD, or -v password=...''; END';
\endif

-- Base backups and the stream are replication connections.
SELECT 'CREATE ROLE walship' WHERE NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'walship') \gexec
ALTER ROLE walship LOGIN REPLICATION PASSWORD :'password' CONNECTION LIMIT 20;

-- What check, status and the metrics read: archiver, slots, senders, settings.
GRANT pg_monitor TO walship;

-- walship switch, and the end of each base backup.
GRANT EXECUTE ON FUNCTION pg_switch_wal() TO walship;

-- walship restore --to-name.
GRANT EXECUTE ON FUNCTION pg_create_restore_point(text) TO walship;

-- Base backups that read the files themselves (WALSHIP_DATA_DIR); leave these two out without.
GRANT EXECUTE ON FUNCTION pg_backup_start(text, boolean), pg_backup_stop(boolean) TO walship;
