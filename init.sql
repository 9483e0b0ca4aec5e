-- The schema, defined here and nowhere else. PostgreSQL's container runs this file when it starts without the table; an
-- instance runs it when it finds no table, so an outside database works too. Safe to run again.

CREATE TABLE IF NOT EXISTS messages (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    author      text        NOT NULL CHECK (author <> ''),
    body        text        NOT NULL CHECK (body <> ''),
    instance    text        NOT NULL,               -- the instance that stored it: web1, web2, web3
    created_at  timestamptz NOT NULL DEFAULT now(),
    -- The idempotency key makes a retried POST safe: stored in the row, so in the same commit as the message.
    -- Prefixed by its source: c: client, p: proxy, s: the service itself.
    request_key text        NOT NULL CONSTRAINT messages_request_key UNIQUE,
    -- The transaction that stored the message: subscribers get messages in this order.
    tx          xid8        NOT NULL DEFAULT pg_current_xact_id()
);

CREATE INDEX IF NOT EXISTS messages_tx ON messages (tx, id);
