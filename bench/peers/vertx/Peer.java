///usr/bin/env jbang "$0" "$@" ; exit $?
//JAVA 21+
//DEPS io.vertx:vertx-web:5.0.10
//DEPS io.vertx:vertx-pg-client:5.0.10
//DEPS io.vertx:vertx-redis-client:5.0.10
// The password check of PostgreSQL, and the native transport that Vert.x takes when it is there.
//DEPS com.ongres.scram:scram-client:3.1
//DEPS io.netty:netty-transport-native-epoll:4.2.12.Final:linux-x86_64
//DEPS io.netty:netty-transport-native-epoll:4.2.12.Final:linux-aarch_64
// Annotations that its classes have, for the compiler.
//DEPS io.vertx:vertx-codegen-api:5.0.10 io.vertx:vertx-codegen-json:5.0.10
// The job of Service.java in Vert.x: an event loop for each CPU, clients that pipeline.
import static java.lang.System.getenv;

import io.vertx.core.DeploymentOptions;
import io.vertx.core.Future;
import io.vertx.core.VerticleBase;
import io.vertx.core.Vertx;
import io.vertx.core.VertxOptions;
import io.vertx.core.json.JsonArray;
import io.vertx.core.json.JsonObject;
import io.vertx.ext.web.Router;
import io.vertx.ext.web.RoutingContext;
import io.vertx.ext.web.handler.BodyHandler;
import io.vertx.pgclient.PgBuilder;
import io.vertx.pgclient.PgConnectOptions;
import io.vertx.redis.client.Command;
import io.vertx.redis.client.Redis;
import io.vertx.redis.client.RedisConnection;
import io.vertx.redis.client.RedisOptions;
import io.vertx.redis.client.Request;
import io.vertx.sqlclient.PoolOptions;
import io.vertx.sqlclient.Row;
import io.vertx.sqlclient.SqlClient;
import io.vertx.sqlclient.Tuple;

public final class Peer extends VerticleBase {
    private static final String INSTANCE = getenv("INSTANCE_ID");
    private SqlClient database;
    private Redis redis;
    private Future<RedisConnection> counters;

    public static void main(String[] arguments) {
        int cpus = Runtime.getRuntime().availableProcessors();
        Vertx vertx = Vertx.vertx(new VertxOptions().setPreferNativeTransport(true).setEventLoopPoolSize(cpus));
        vertx.deployVerticle(Peer.class.getName(), new DeploymentOptions().setInstances(cpus))
            .onSuccess(id -> System.out.println("listening"))
            .onFailure(failure -> { failure.printStackTrace(); System.exit(1); });
    }

    @Override
    public Future<?> start() {
        // Not a pool but a client of one: what many ask is pipelined over few connections (PgBuilder.client()).
        database = PgBuilder.client()
            .connectingTo(new PgConnectOptions().setHost(getenv("DB_HOST")).setDatabase(getenv("DB_NAME"))
                .setUser(getenv("DB_USER")).setPassword(getenv("DB_PASS")).setCachePreparedStatements(true))
            .with(new PoolOptions().setMaxSize(4)).using(vertx).build();
        redis = Redis.createClient(vertx, new RedisOptions().setPassword(getenv("REDIS_PASS"))
            .setConnectionString("redis://" + getenv("REDIS_HOST")));
        connect();
        Router router = Router.router(vertx);
        router.get("/").handler(this::visit);
        router.post("/api/messages").handler(BodyHandler.create(false)).handler(this::post);
        router.get("/api/messages").handler(this::newest);
        router.get("/healthz").handler(request -> request.json(new JsonObject().put("status", "ok")));
        return vertx.createHttpServer().requestHandler(router).listen(9999);
    }

    /** One connection, on which commands are pipelined; a new one when it breaks (its "Implementing Reconnect"). */
    private void connect() {
        counters = redis.connect().onSuccess(connection ->
            connection.exceptionHandler(failure -> connect()).endHandler(end -> connect()))
            .onFailure(failure -> vertx.setTimer(100, timer -> connect()));
    }

    private void visit(RoutingContext request) {
        counters.compose(connection -> connection.send(Request.cmd(Command.INCR).arg("visits")))
            .onSuccess(count -> request.json(new JsonObject().put("instance", INSTANCE).put("visits", count.toLong())))
            .onFailure(request::fail);
    }

    private void post(RoutingContext request) {
        JsonObject fields = request.body().asJsonObject();
        String author = text(fields.getString("author"), 80), body = text(fields.getString("body"), 2000);
        if (author == null || body == null) { request.response().setStatusCode(422).end(); return; }
        database.preparedQuery("INSERT INTO messages (author, body, instance, request_key) "
                + "VALUES ($1, $2, $3, 's:' || gen_random_uuid()) RETURNING id, author, body, instance, created_at")
            .execute(Tuple.of(author, body, INSTANCE))
            .onSuccess(rows -> {
                Row row = rows.iterator().next();
                request.response().setStatusCode(201).putHeader("Location", "/api/messages/" + row.getLong(0));
                request.json(message(row));
            }).onFailure(request::fail);
    }

    private void newest(RoutingContext request) {
        int limit = Math.clamp(Integer.parseInt(request.request().getParam("limit", "20")), 1, 100);
        database.preparedQuery("SELECT id, author, body, instance, created_at FROM messages ORDER BY id DESC LIMIT $1")
            .execute(Tuple.of(limit))
            .onSuccess(rows -> {
                JsonArray messages = new JsonArray();
                rows.forEach(row -> messages.add(message(row)));
                request.json(new JsonObject().put("messages", messages));
            }).onFailure(request::fail);
    }

    private static String text(String value, int longest) {
        String text = value == null ? "" : value.strip();
        return text.isEmpty() || text.codePointCount(0, text.length()) > longest ? null : text;
    }

    private static JsonObject message(Row row) {
        return new JsonObject().put("id", row.getLong(0)).put("author", row.getString(1)).put("body", row.getString(2))
            .put("instance", row.getString(3)).put("createdAt", row.getOffsetDateTime(4).toString());
    }
}
