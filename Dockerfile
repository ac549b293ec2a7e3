# walship as a container: a wheel built from this checkout, with the versions of constraints.lock, run by nobody special.
#
#   docker build -t walship .                             # with the programs of PostgreSQL 18, for restores and drills
#   docker build -t walship --build-arg PG_MAJORS="16 17" .
#   docker build -t walship --target shipper .            # without them: ships, backs up, lists, verifies
#
# PG_MAJORS are the majors of the servers that are to be restored or drilled here. Restoring wants the same major.
#
# Pinned are walship's libraries (constraints.lock) and Python (the base's tag). A digest pins the base's own packages as
# well. What apt brings, PostgreSQL, is of the day, for its security updates: who wants the same each time keeps the image.
#
#   docker build -t walship --build-arg BASE=python:3.13.16-slim-bookworm@sha256:... .

ARG BASE=python:3.13.16-slim-bookworm

# The wheel, and an environment of it and what it needs. Nothing of what builds it gets into the image.
FROM ${BASE} AS build
WORKDIR /src
COPY constraints.lock ./
RUN python3 -m venv /opt/build \
    && /opt/build/bin/pip install --no-cache-dir --constraint constraints.lock build hatchling editables \
    && python3 -m venv /opt/walship
COPY pyproject.toml README.md LICENSE .env.example ./
COPY pipeline pipeline
COPY handlers handlers
COPY infra infra
RUN /opt/build/bin/python -m build --wheel --no-isolation --outdir /dist \
    && /opt/walship/bin/pip install --no-cache-dir --constraint constraints.lock /dist/*.whl \
    && /opt/walship/bin/pip uninstall --yes pip setuptools

# What ships. 999 is the user of PostgreSQL's own image: the segments that basic_archive writes are readable for their
# owner alone. It is made first: packages take the system's numbers from the top. The image may run as another user
# (SERVER_USER of infra/deploy/compose/host.yml), who has to look for .env in its folder, and to restore. And a tmpfs that
# an engine puts over a folder belongs to root, with the mode of what it covers: so these are for everybody, like /tmp.
FROM ${BASE} AS shipper
RUN groupadd --gid 999 walship \
    && useradd --uid 999 --gid walship --home-dir /var/lib/walship --no-create-home --shell /usr/sbin/nologin walship \
    && install -d -o walship -g walship -m 0700 /spool /backups \
    && install -d -o walship -g walship -m 1777 /var/lib/walship /restored
COPY --from=build /opt/walship /opt/walship
ENV PATH=/opt/walship/bin:$PATH PYTHONUNBUFFERED=1 WALSHIP_LISTEN=0.0.0.0:9432
# In numbers: Kubernetes' runAsNonRoot cannot know that a name is not root's.
USER 999:999
WORKDIR /var/lib/walship
EXPOSE 9432
# That the service's loop turns; /readyz says whether it ships.
HEALTHCHECK --interval=30s --timeout=6s --start-period=20s CMD ["python3", "-c", \
    "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['WALSHIP_LISTEN'].rpartition(':')[2] + '/healthz', timeout=5)"]
# SIGTERM ends `run` in good order, within seconds; what is not acknowledged stays where PostgreSQL keeps it.
STOPSIGNAL SIGTERM
ENTRYPOINT ["walship"]
CMD ["run"]

# And the programs of PostgreSQL, from Debian where it has that major, else from PostgreSQL's own packages. tini is the
# first process: it buries what a server that is restored or drilled here leaves behind. Debian's servers put their
# sockets into /run/postgresql, which is for everybody, as in PostgreSQL's own image.
FROM shipper
ARG PG_MAJORS=18
USER root
RUN set -eu; export DEBIAN_FRONTEND=noninteractive; \
    apt-get update; \
    apt-get install --yes --no-install-recommends ca-certificates postgresql-common tini; \
    sed -i "s/^#\\?create_main_cluster.*/create_main_cluster = false/" /etc/postgresql-common/createcluster.conf; \
    for major in $PG_MAJORS; do \
        apt-cache show "postgresql-$major" >/dev/null 2>&1 || /usr/share/postgresql-common/pgdg/apt.postgresql.org.sh -y; \
        apt-get install --yes --no-install-recommends "postgresql-$major"; \
    done; \
    apt-get clean; \
    rm -rf /var/lib/apt/lists/* /var/lib/postgresql /etc/ssl/private/ssl-cert-snakeoil.key /etc/ssl/certs/ssl-cert-snakeoil.pem; \
    install -d -o walship -g walship -m 1777 /run/postgresql
USER 999:999
ENTRYPOINT ["tini", "-s", "--", "walship"]
CMD ["run"]
