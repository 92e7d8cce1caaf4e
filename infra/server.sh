#!/usr/bin/env bash
# The tracking server of infra/compose.yaml. `server.sh up` starts it and waits until it answers; `server.sh down` stops
# it and keeps what it holds; `server.sh down --volumes` removes that too. infra/.env has its settings and passwords.
set -euo pipefail
cd "$(dirname "$0")"

fail() {
    echo "$*" >&2
    exit 1
}

compose() {
    if docker compose version >/dev/null 2>&1; then
        docker compose --file compose.yaml --env-file .env "$@"
    else
        docker-compose --file compose.yaml --env-file .env "$@"
    fi
}

setting() { # the value of a name in .env
    sed -n "s/^$1=//p" .env | tail -n 1
}

need_docker() {
    command -v docker >/dev/null || fail "there is no docker command: install Docker Engine with its compose plugin"
    docker compose version >/dev/null 2>&1 || command -v docker-compose >/dev/null ||
        fail "docker has no compose: install its plugin (package docker-compose-plugin, docker-compose-v2 or docker-compose)"
    docker info >/dev/null 2>&1 || fail "no Docker engine answers: start it, or set DOCKER_HOST"
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
    image=$(setting SVIP_IMAGE)
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
    address=$(setting SERVER_ADDRESS)
    cat <<END

The server answers. In a shell that is to use it:

    set -a; . infra/.env; set +a      # the passwords: MLflow's and S3's
    export MLFLOW_TRACKING_URI=http://$address:$(setting MLFLOW_PORT)
    export AWS_ENDPOINT_URL=http://$address:$(setting S3_PORT)      # buckets: mlflow (its artifacts), svip (yours)
    export SVIP_TUNING_STORAGE=postgresql+psycopg2://optuna:\$OPTUNA_DB_PASSWORD@$address:$(setting POSTGRES_PORT)/optuna

In a browser: http://$address:$(setting MLFLOW_PORT), as $(setting MLFLOW_TRACKING_USERNAME) with MLFLOW_TRACKING_PASSWORD of infra/.env.
END
}

down() {
    [ -e .env ] || fail "there is no infra/.env: nothing was started from here"
    compose down "$@"
    case ${1:-} in
    --volumes) echo "stopped; all runs, artifacts and studies that it held are gone" ;;
    *) echo "stopped; what it holds stays in Docker's volumes: \`make up\` goes on with it, \`make down VOLUMES=remove\` removes it" ;;
    esac
}

case ${1:-} in
up) need_docker && up ;;
down) need_docker && down "${@:2}" ;;
env) make_env ;;
*) fail "usage: infra/server.sh up | down [--volumes] | env" ;;
esac
