#!/bin/sh
# A role and a database for Dagster and for MLflow; neither may read the other's. The image of Postgres runs it once.
set -eu
for name in dagster mlflow; do
    case $name in
        dagster) password=$DAGSTER_PG_PASSWORD ;;
        mlflow) password=$MLFLOW_PG_PASSWORD ;;
    esac
    psql -v ON_ERROR_STOP=1 -v name="$name" -v password="$password" --username "$POSTGRES_USER" --dbname postgres <<'SQL'
CREATE ROLE :"name" LOGIN PASSWORD :'password';
CREATE DATABASE :"name" OWNER :"name";
REVOKE ALL ON DATABASE :"name" FROM PUBLIC;
SQL
done
