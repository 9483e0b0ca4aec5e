# shellcheck shell=bash
# The environment of each bench, whatever the caller's or .env sets. Sourced before lib.sh, which reads settings.
export LC_ALL=C PORT=0 COMPOSE_PATH_SEPARATOR=:
export DB_NAME=app DB_USER=app DB_PASS=app REDIS_PASS=redis POSTGRES_PASSWORD=postgres
BUILDX_BUILDER=$(docker context show) # the engine's own builder has the image that others are built on
export BUILDX_BUILDER
