#!/usr/bin/env bash
# The tracking server of infra/compose.yaml. `server.sh up` starts it and waits until it answers; `server.sh down` stops
# it and keeps what it holds; `server.sh down --volumes` removes that too; `server.sh compose ...` is any other command
# of Compose; `server.sh engine` fails where no Docker engine answers. infra/.env has the server's settings and
# passwords.
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "$*" >&2
    exit 1
}

# Compose prefers the shell's variables to .env's, and a shell may well have AWS keys, or a login to MLflow, of its own.
compose() (
    while IFS= read -r name; do
        unset "$name"
    done < <(sed -n 's/^\([A-Z0-9_]*\)=.*/\1/p' .env)
    if docker compose version >/dev/null 2>&1; then
        docker compose --file compose.yaml --env-file .env "$@"
    else
        docker-compose --file compose.yaml --env-file .env "$@"
    fi
)

setting() { # NAME DEFAULT: the value in .env
    local value
    value=$(sed -n "s/^$1=//p" .env | tail -n 1)
    echo "${value:-$2}"
}

need_engine() {
    command -v docker >/dev/null || fail "there is no docker command: install Docker Engine with its compose plugin"
    docker info >/dev/null 2>&1 || fail "no Docker engine answers: start it, or set DOCKER_HOST"
}

need_docker() {
    need_engine
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null ||
        fail "docker has no compose: install its plugin (package docker-compose-plugin, docker-compose-v2 or docker-compose)"
}

# .env.example with a random value for each name that has none; written aside first, so that it is whole or not there
make_env() {
    [ ! -e .env ] || return 0
    local draft line
    draft=$(mktemp .env.XXXXXX) # mode 0600
    while IFS= read -r line; do
        case $line in
        '#'* | *=?* | '') ;;
        *) line=$line$(od -An -N 20 -tx1 /dev/urandom | tr -d ' \n') ;;
        esac
        printf '%s\n' "$line"
    done <.env.example >"$draft"
    mv "$draft" .env
    echo "wrote infra/.env with random passwords: keep a copy of it with your backups"
}

state_of() { # of a service's container: starting, healthy, unhealthy, exited ...
    local id
    id=$(compose ps --quiet "$1")
    [ -n "$id" ] || return 0
    docker inspect --format '{{if .State.Health}}{{.State.Health.Status}}{{else}}{{.State.Status}}{{end}}' "$id"
}

up() {
    local image state
    make_env
    image=$(setting SVIP_IMAGE svip:latest)
    docker image inspect "$image" >/dev/null 2>&1 || docker pull --quiet "$image" ||
        fail "there is no image $image: build it with \`make image\`, or name another one as SVIP_IMAGE in infra/.env"
    compose up --detach
    for _ in $(seq 90); do
        state=$(state_of mlflow)
        case $state in
        healthy) break ;;
        exited | unhealthy | dead) break ;;
        esac
        sleep 2
    done
    if [ "$state" != healthy ]; then
        compose logs --tail 20 >&2
        fail "MLflow is '${state:-not created}', not healthy: its last lines are above"
    fi
    local address
    address=$(setting SERVER_ADDRESS 127.0.0.1)
    cat <<END

The server answers. In a shell that is to use it:

    set -a; . infra/.env; set +a      # the passwords: MLflow's and S3's
    export MLFLOW_TRACKING_URI=http://$address:$(setting MLFLOW_PORT 5000)
    export AWS_ENDPOINT_URL=http://$address:$(setting S3_PORT 8333)      # buckets: mlflow (its artifacts), svip (yours)
    export SVIP_TUNING_STORAGE=postgresql+psycopg2://optuna:\$OPTUNA_DB_PASSWORD@$address:$(setting POSTGRES_PORT 5432)/optuna

In a browser: http://$address:$(setting MLFLOW_PORT 5000), as $(setting MLFLOW_TRACKING_USERNAME svip) with MLFLOW_TRACKING_PASSWORD of infra/.env.
END
}

started_here() {
    [ -e .env ] || fail "there is no infra/.env: nothing was started from here"
}

down() {
    compose down "$@"
    case ${1:-} in
    --volumes) echo "stopped; all runs, artifacts and studies that it held are gone" ;;
    *) echo "stopped; what it holds stays in Docker's volumes: \`make up\` goes on with it, \`make down VOLUMES=remove\` removes it" ;;
    esac
}

case ${1:-} in
up) need_docker && up ;;
down) need_docker && started_here && down "${@:2}" ;;
compose) started_here && compose "${@:2}" ;;
env) make_env ;;
engine) need_engine ;;
*) fail "usage: infra/server.sh up | down [--volumes] | compose ... | env | engine" ;;
esac
