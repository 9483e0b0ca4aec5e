"""The job of Service.java in Flask, as its documentation and gunicorn's say it is run."""
import os

import redis
from flask import Flask, jsonify, request
from psycopg_pool import ConnectionPool

INSTANCE = os.environ["INSTANCE_ID"]
# psycopg prepares what is asked for the fifth time. A statement alone needs no transaction around it.
database = ConnectionPool(
    "", min_size=8, max_size=8, open=True,
    kwargs={"host": os.environ["DB_HOST"], "dbname": os.environ["DB_NAME"], "user": os.environ["DB_USER"],
            "password": os.environ["DB_PASS"], "autocommit": True})
counters = redis.Redis(host=os.environ["REDIS_HOST"], password=os.environ["REDIS_PASS"])
app = Flask(__name__)


def message(row):
    return {"id": row[0], "author": row[1], "body": row[2], "instance": row[3], "createdAt": row[4].isoformat()}


def text(fields, name, longest):
    value = fields.get(name) if isinstance(fields, dict) else None
    return value.strip() if isinstance(value, str) and 0 < len(value.strip()) <= longest else None


@app.get("/")
def visit():
    return jsonify(instance=INSTANCE, visits=counters.incr("visits"))


@app.post("/api/messages")
def post():
    fields = request.get_json()
    author, body = text(fields, "author", 80), text(fields, "body", 2000)
    if not author or not body:
        return jsonify(error="author: 1 to 80 characters, body: 1 to 2000"), 422
    with database.connection() as connection:
        row = connection.execute(
            "INSERT INTO messages (author, body, instance, request_key)"
            " VALUES (%s, %s, %s, 's:' || gen_random_uuid())"
            " RETURNING id, author, body, instance, created_at", (author, body, INSTANCE)).fetchone()
    return jsonify(message(row)), 201, {"Location": f"/api/messages/{row[0]}"}


@app.get("/api/messages")
def newest():
    limit = min(max(request.args.get("limit", 20, int), 1), 100)
    with database.connection() as connection:
        rows = connection.execute(
            "SELECT id, author, body, instance, created_at FROM messages ORDER BY id DESC LIMIT %s",
            (limit,)).fetchall()
    return jsonify(messages=[message(row) for row in rows])


@app.get("/healthz")
def healthz():
    return jsonify(status="ok")
