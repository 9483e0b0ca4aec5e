// The job of Service.java in Fastify, as its documentation says: one process for one CPU, schemas for requests and
// responses.
import Fastify from 'fastify';
import { Redis } from 'ioredis';
import pg from 'pg';

const { INSTANCE_ID, DB_HOST, DB_NAME, DB_USER, DB_PASS, REDIS_HOST, REDIS_PASS } = process.env;
pg.types.setTypeParser(pg.types.builtins.INT8, Number);
const database = new pg.Pool({ host: DB_HOST, database: DB_NAME, user: DB_USER, password: DB_PASS, max: 10 });
const counters = new Redis({ host: REDIS_HOST, password: REDIS_PASS, enableAutoPipelining: true });

const message = {
  type: 'object',
  properties: {
    id: { type: 'integer' }, author: { type: 'string' }, body: { type: 'string' }, instance: { type: 'string' },
    createdAt: { type: 'string', format: 'date-time' }
  }
};
const text = longest => ({ type: 'string', minLength: 1, maxLength: longest, pattern: '\\S' });

const app = Fastify({ logger: false });

app.get('/', {
  schema: { response: { 200: {
    type: 'object', properties: { instance: { type: 'string' }, visits: { type: 'integer' } }
  } } }
}, async () => ({ instance: INSTANCE_ID, visits: await counters.incr('visits') }));

app.post('/api/messages', {
  schema: {
    body: { type: 'object', required: ['author', 'body'], properties: { author: text(80), body: text(2000) } },
    response: { 201: message }
  }
}, async (request, reply) => {
  const { rows: [row] } = await database.query({
    name: 'post',                          // a named statement is prepared once for each connection
    text: `INSERT INTO messages (author, body, instance, request_key)
             VALUES ($1, $2, $3, 's:' || gen_random_uuid())
             RETURNING id, author, body, instance, created_at AS "createdAt"`,
    values: [request.body.author.trim(), request.body.body.trim(), INSTANCE_ID]
  });
  reply.code(201).header('Location', `/api/messages/${row.id}`);
  return row;
});

app.get('/api/messages', {
  schema: {
    querystring: {
      type: 'object', properties: { limit: { type: 'integer', minimum: 1, maximum: 100, default: 20 } }
    },
    response: { 200: { type: 'object', properties: { messages: { type: 'array', items: message } } } }
  }
}, async request => {
  const { rows } = await database.query({
    name: 'newest',
    text: `SELECT id, author, body, instance, created_at AS "createdAt" FROM messages ORDER BY id DESC LIMIT $1`,
    values: [request.query.limit]
  });
  return { messages: rows };
});

app.get('/healthz', {
  schema: { response: { 200: { type: 'object', properties: { status: { type: 'string' } } } } }
}, async () => ({ status: 'ok' }));

console.log('listening at', await app.listen({ host: '0.0.0.0', port: 9999 }));
for (const signal of ['SIGTERM', 'SIGINT']) process.once(signal, () => process.exit(0));
