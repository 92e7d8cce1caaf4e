-- Run once, by the image's entry point, on an empty data folder (as the superuser): MLflow's databases and Optuna's.
\getenv mlflow_password MLFLOW_DB_PASSWORD
\getenv optuna_password OPTUNA_DB_PASSWORD
CREATE ROLE mlflow LOGIN PASSWORD :'mlflow_password';
CREATE ROLE optuna LOGIN PASSWORD :'optuna_password';
CREATE DATABASE mlflow OWNER mlflow;
CREATE DATABASE mlflow_auth OWNER mlflow;
CREATE DATABASE optuna OWNER optuna;
-- each sees its own only
REVOKE CONNECT ON DATABASE mlflow, mlflow_auth, optuna, postgres FROM PUBLIC;
