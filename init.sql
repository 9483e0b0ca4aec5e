-- The schema, defined here and nowhere else. PostgreSQL's container runs this file when it starts without the
-- table; an instance runs it when it finds no table or one of an earlier version, so an outside database works too.
-- Safe to run again.

CREATE TABLE IF NOT EXISTS messages (
    id          bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    author      text        NOT NULL CHECK (author <> ''),
    body        text        NOT NULL CHECK (body <> ''),
    instance    text        NOT NULL,               -- who stored it: web1, web2, web3
    created_at  timestamptz NOT NULL DEFAULT now(),
    -- What makes a repeated POST safe: the key is stored in the same row, so in the same commit, as the
    -- message it stands for. Prefixed by where it came from: c: client, p: proxy, s: the service itself.
    request_key text        NOT NULL CONSTRAINT messages_request_key UNIQUE
);

-- The transaction that stored the message: in this order, messages are told to viewers. Rows of an earlier version, and
-- of its instances that may still run, get theirs here by the default; the table is not written anew.
ALTER TABLE messages ADD COLUMN IF NOT EXISTS tx xid8 NOT NULL DEFAULT pg_current_xact_id();
CREATE INDEX IF NOT EXISTS messages_tx ON messages (tx, id);
