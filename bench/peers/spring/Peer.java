///usr/bin/env jbang "$0" "$@" ; exit $?
//JAVA 21+
//DEPS org.springframework.boot:spring-boot-dependencies:4.1.2@pom
//DEPS org.springframework.boot:spring-boot-starter-webmvc
//DEPS org.springframework.boot:spring-boot-starter-jdbc
//DEPS org.springframework.boot:spring-boot-starter-data-redis
//DEPS org.postgresql:postgresql
// The job of Service.java in Spring Boot, as its documentation says: virtual threads, HikariCP, Lettuce's one shared
// connection. Settings are in application.properties.
package peer;

import java.net.URI;
import java.time.OffsetDateTime;
import java.util.List;
import java.util.Map;
import org.springframework.beans.factory.annotation.Value;
import org.springframework.boot.SpringApplication;
import org.springframework.boot.autoconfigure.SpringBootApplication;
import org.springframework.data.redis.core.StringRedisTemplate;
import org.springframework.http.ResponseEntity;
import org.springframework.jdbc.core.JdbcTemplate;
import org.springframework.jdbc.core.RowMapper;
import org.springframework.web.bind.annotation.GetMapping;
import org.springframework.web.bind.annotation.PostMapping;
import org.springframework.web.bind.annotation.RequestBody;
import org.springframework.web.bind.annotation.RequestParam;
import org.springframework.web.bind.annotation.RestController;

@SpringBootApplication
@RestController
public class Peer {
    public record Draft(String author, String body) {}
    public record Message(long id, String author, String body, String instance, OffsetDateTime createdAt) {}
    public record Visit(String instance, Long visits) {}

    private static final RowMapper<Message> MESSAGE = (row, number) -> new Message(row.getLong(1), row.getString(2),
        row.getString(3), row.getString(4), row.getObject(5, OffsetDateTime.class));

    private final JdbcTemplate database;
    private final StringRedisTemplate counters;
    private final String instance;

    Peer(JdbcTemplate database, StringRedisTemplate counters, @Value("${instance.id}") String instance) {
        this.database = database;
        this.counters = counters;
        this.instance = instance;
    }

    public static void main(String[] arguments) {
        SpringApplication.run(Peer.class, arguments);
    }

    @GetMapping("/")
    public Visit visit() {
        return new Visit(instance, counters.opsForValue().increment("visits"));
    }

    @PostMapping("/api/messages")
    public ResponseEntity<Message> post(@RequestBody Draft draft) {
        String author = text(draft.author(), 80), body = text(draft.body(), 2000);
        if (author == null || body == null) return ResponseEntity.unprocessableContent().build();
        Message stored = database.queryForObject("""
            INSERT INTO messages (author, body, instance, request_key) VALUES (?, ?, ?, 's:' || gen_random_uuid())
            RETURNING id, author, body, instance, created_at""", MESSAGE, author, body, instance);
        return ResponseEntity.created(URI.create("/api/messages/" + stored.id())).body(stored);
    }

    @GetMapping("/api/messages")
    public Map<String, List<Message>> newest(@RequestParam(name = "limit", defaultValue = "20") int limit) {
        return Map.of("messages", database.query(
            "SELECT id, author, body, instance, created_at FROM messages ORDER BY id DESC LIMIT ?",
            MESSAGE, Math.clamp(limit, 1, 100)));
    }

    @GetMapping("/healthz")
    public Map<String, String> healthz() {
        return Map.of("status", "ok");
    }

    private static String text(String value, int longest) {
        String text = value == null ? "" : value.strip();
        return text.isEmpty() || text.codePointCount(0, text.length()) > longest ? null : text;
    }
}
