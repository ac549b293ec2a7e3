# walship as a container: a wheel built from this checkout, with the versions of constraints.lock, run by nobody special.

FROM python:3.13-slim-bookworm AS build
WORKDIR /src
COPY constraints.lock ./
RUN python -m venv /opt/build && /opt/build/bin/pip install --no-cache-dir -c constraints.lock build hatchling editables \
    && python -m venv /opt/walship
COPY pyproject.toml README.md LICENSE ./
COPY pipeline pipeline
COPY handlers handlers
COPY infra infra
RUN /opt/build/bin/python -m build --wheel --no-isolation --outdir /dist \
    && /opt/walship/bin/pip install --no-cache-dir -c constraints.lock /dist/*.whl

FROM python:3.13-slim-bookworm
# 999 is the user of PostgreSQL's own image: the segments that basic_archive writes are readable for their owner alone.
RUN groupadd --system --gid 999 walship \
    && useradd --system --uid 999 --gid walship --home-dir /var/lib/walship --create-home walship \
    && install -d -o walship -g walship -m 0700 /spool /backups
COPY --from=build /opt/walship /opt/walship
ENV PATH=/opt/walship/bin:$PATH PYTHONUNBUFFERED=1
USER walship
WORKDIR /var/lib/walship
ENTRYPOINT ["walship"]
CMD ["run"]
