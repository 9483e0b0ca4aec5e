import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import io.undertow.Handlers;
import io.undertow.Undertow;
import io.undertow.server.HttpServerExchange;
import io.undertow.server.handlers.BlockingHandler;
import io.undertow.util.Headers;
import io.undertow.util.HttpString;
import java.io.IOException;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.PreparedStatement;
import java.sql.ResultSet;
import java.sql.SQLException;
import java.util.UUID;

import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * What `POST /api/messages` is compared to: the plain blocking way, on the same libraries. Each request has a thread of
 * sixteen and the thread's own connection for as long as it takes; each message is one INSERT and one commit. It has
 * less to do: it checks nothing, and does not answer a repeated request with what was stored. Its /healthz is what the
 * service's is compared to: a handler that only answers.
 */
public class Blocking {
    private static final ThreadLocal<Connection> DATABASE = ThreadLocal.withInitial(Blocking::connect);
    private static final HttpString INSTANCE_ID = new HttpString("X-Instance-Id");
    private static final HttpString REQUEST_ID = new HttpString("X-Request-Id");
    private static final HttpString CONTENT_TYPE_OPTIONS = new HttpString("X-Content-Type-Options");

    public static void main(String[] args) {
        var paths = Handlers.path(new BlockingHandler(Blocking::store)).addExactPath("/healthz", Blocking::healthz);
        Undertow.builder().addHttpListener(9999, "0.0.0.0").setIoThreads(1).setWorkerThreads(16).setHandler(paths)
                .build().start();
    }

    /** As many bytes as the service answers to the same request, and nothing else is done: no id, no metrics. */
    private static void healthz(HttpServerExchange exchange) {
        exchange.getResponseHeaders()
                .put(Headers.CONTENT_TYPE, "application/json").put(Headers.CACHE_CONTROL, "no-store")
                .put(INSTANCE_ID, "web1").put(REQUEST_ID, "f0e1d2c3b4a59687").put(CONTENT_TYPE_OPTIONS, "nosniff");
        exchange.getResponseSender().send("{\"status\":\"ok\",\"instance\":\"web1\"}");
    }

    /** Connects as docker-compose.yml says; every statement is prepared on the server from its first use. */
    private static Connection connect() {
        try {
            String url = "jdbc:postgresql://postgres/" + System.getenv("DB_NAME") + "?prepareThreshold=1";
            return DriverManager.getConnection(url, System.getenv("DB_USER"), System.getenv("DB_PASS"));
        } catch (SQLException e) {
            throw new IllegalStateException(e);
        }
    }

    private static void store(HttpServerExchange exchange) throws SQLException, IOException {
        String body = new String(exchange.getInputStream().readAllBytes(), UTF_8);
        JsonObject message = JsonParser.parseString(body).getAsJsonObject();
        try (PreparedStatement insert = DATABASE.get().prepareStatement("""
                INSERT INTO messages (author, body, instance, request_key) VALUES (?, ?, 'blocking', ?)
                ON CONFLICT (request_key) DO NOTHING RETURNING id, created_at""")) {
            insert.setString(1, message.get("author").getAsString());
            insert.setString(2, message.get("body").getAsString());
            insert.setString(3, "s:" + UUID.randomUUID());
            try (ResultSet stored = insert.executeQuery()) {
                stored.next();
                message.addProperty("id", stored.getLong("id"));
                message.addProperty("createdAt", stored.getTimestamp("created_at").toInstant().toString());
            }
        }
        exchange.setStatusCode(201).getResponseHeaders()
                .put(Headers.CONTENT_TYPE, "application/json")
                .put(Headers.LOCATION, "/api/messages/" + message.get("id"));
        exchange.getResponseSender().send(message.toString());
    }
}
