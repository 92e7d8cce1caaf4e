#!/usr/bin/env bash
# Writes the files that kustomization.yaml, beside this script, makes Secrets of, with random passwords.
# AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment are the keys of your S3; without them they are random
# too, which suits the store that overlays/dev brings along and no other.
set -euo pipefail
cd "$(dirname "$0")"
umask 077

random() {
    od -An -N 20 -tx1 /dev/urandom | tr -d ' \n'
}

for name in svip-mlflow svip-s3 svip-tuning svip-server; do
    if [ -e "$name.env" ]; then
        echo "$PWD/$name.env is there: the database has its passwords already, so nothing was written" >&2
        exit 1
    fi
done
optuna=$(random)

# clients: pipelines and training; a Job makes this login, which is no administrator
cat >svip-mlflow.env <<END
MLFLOW_TRACKING_URI=http://svip-mlflow:5000
MLFLOW_TRACKING_USERNAME=svip
MLFLOW_TRACKING_PASSWORD=$(random)
END
cat >svip-s3.env <<END
AWS_ACCESS_KEY_ID=${AWS_ACCESS_KEY_ID:-svip}
AWS_SECRET_ACCESS_KEY=${AWS_SECRET_ACCESS_KEY:-$(random)}
END
cat >svip-tuning.env <<END
SVIP_TUNING_STORAGE=postgresql+psycopg2://optuna:$optuna@svip-postgres:5432/optuna
END
# MLflow's server and its database
cat >svip-server.env <<END
POSTGRES_PASSWORD=$(random)
MLFLOW_DB_PASSWORD=$(random)
OPTUNA_DB_PASSWORD=$optuna
MLFLOW_ADMIN_USERNAME=admin
MLFLOW_ADMIN_PASSWORD=$(random)
MLFLOW_FLASK_SERVER_SECRET_KEY=$(random)
END
echo "wrote svip-mlflow.env, svip-s3.env, svip-tuning.env and svip-server.env in $PWD: keep a copy with your backups"
