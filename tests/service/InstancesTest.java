import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import org.junit.jupiter.api.AfterAll;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.TestInstance;
import org.junit.jupiter.api.extension.ExtendWith;

import java.io.IOException;
import java.time.Duration;
import java.time.Instant;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.concurrent.CompletableFuture;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

/** Who is here: each instance knows of all others, and soon of what becomes of them. */
@ExtendWith(LogCapture.class)
@TestInstance(TestInstance.Lifecycle.PER_CLASS)
class InstancesTest {
    private final FaultProxy cable = new FaultProxy(Servers.redisPort());
    private final Instance one = begin("one", Map.of());
    private final Instance other = begin("other", Map.of("REDIS_PORT", "" + cable.port()));

    InstancesTest() throws IOException {}

    /** In a database of Redis of their own: the instances of other tests are none of theirs. */
    private static Instance begin(String name, Map<String, String> more) {
        Map<String, String> environment = new HashMap<>(Servers.environment(Servers.newDatabase()));
        environment.put("REDIS_DB", "8");
        environment.putAll(more);
        return new Instance(name, environment);
    }

    @AfterAll void close() throws IOException {
        other.close();
        one.close();
        cable.close();
    }

    private static JsonObject seen(Caller by, String name) {
        for (var row : JsonParser.parseString(by.get("/api/instances").expect(200).body()).getAsJsonArray())
            if (row.getAsJsonObject().get("instance").getAsString().equals(name)) return row.getAsJsonObject();
        return new JsonObject();
    }

    private static String state(Caller by, String name) {
        JsonObject row = seen(by, name);
        return row.has("state") ? row.get("state").getAsString() : "none";
    }

    private static void awaitState(Caller by, String name, String state, int millis) {
        Wait.until(name + " is " + state, Duration.ofMillis(millis), () -> state(by, name).equals(state));
    }

    @Test void are_told_alike_by_each() {
        for (Instance by : List.of(one, other))
            for (Instance of : List.of(one, other)) awaitState(by, of.name, "ready", 5_000);
        JsonObject row = seen(one, "other");
        assertEquals(List.of("instance", "state", "since", "version", "requestsPerSecond"), List.copyOf(row.keySet()));
        assertTrue(Duration.between(Instant.parse(row.get("since").getAsString()), Instant.now()).toMinutes() < 10);
        String version = JsonParser.parseString(one.get("/openapi.json").body()).getAsJsonObject()
                .getAsJsonObject("info").get("version").getAsString();
        assertEquals(version, row.get("version").getAsString());
        row.remove("requestsPerSecond");
        JsonObject same = seen(other, "other");
        same.remove("requestsPerSecond");
        assertEquals(row, same);
    }

    @Test void say_how_much_they_do() {
        awaitState(one, "other", "ready", 5_000);
        Wait.until("twenty or more a second", Duration.ofSeconds(5), () -> {
            for (int i = 0; i < 40; i++) other.get("/healthz");
            return seen(one, "other").get("requestsPerSecond").getAsLong() >= 20;
        });
        Wait.until("nothing to do", Duration.ofSeconds(5),
                () -> seen(one, "other").get("requestsPerSecond").getAsLong() == 0);
    }

    @Test void that_fall_silent_are_soon_seen_as_silent_then_as_gone_and_are_back_at_once() throws Exception {
        awaitState(one, "other", "ready", 5_000);
        cable.cut();
        awaitState(one, "other", "silent", 2_000);
        assertTrue(seen(one, "other").get("requestsPerSecond").isJsonNull());
        awaitState(other, "one", "unknown", 2_000); // it hears nothing, and knows it
        awaitState(other, "other", "unknown", 2_000);
        assertEquals("ready", state(one, "one"));
        awaitState(one, "other", "gone", 10_500);
        cable.mend();
        awaitState(one, "other", "ready", 1_500);
        awaitState(other, "one", "ready", 1_500); // not silent, nor gone: it did not listen
    }

    /** Of one that is dead, nothing is known after a new subscription, until its silence says it. */
    @Test void that_are_dead_do_not_come_to_life_by_a_new_subscription() throws Exception {
        try (FaultProxy own = new FaultProxy(Servers.redisPort());
             Instance mute = begin("mute", Map.of("REDIS_PORT", "" + own.port()))) {
            awaitState(other, mute.name, "ready", 5_000);
            own.cut();
            awaitState(other, mute.name, "silent", 3_000);
            cable.cut();
            awaitState(other, "one", "unknown", 2_000);
            cable.mend();
            awaitState(other, "one", "ready", 3_000);
            for (int i = 0; i < 200; i++) {
                assertTrue(!state(other, mute.name).equals("ready"), "it says nothing");
                Thread.sleep(10);
            }
        }
    }

    @Test void that_leave_say_so() throws Exception {
        Instance leaving = begin("leaving", Map.of("DRAIN_MILLIS", "1500"));
        awaitState(one, "leaving", "ready", 5_000);
        CompletableFuture<Void> closed = Wait.meanwhile(() -> {
            leaving.close();
            return null;
        });
        awaitState(one, "leaving", "draining", 1_500);
        closed.get();
        awaitState(one, "leaving", "gone", 500);
    }

    /** As where a new one starts before the old one stops. */
    @Test void with_one_name_are_the_younger_one_while_it_is_there() throws Exception {
        try (Instance older = begin("twin", Map.of())) {
            awaitState(one, "twin", "ready", 5_000);
            String first = since("twin");
            Instance younger = begin("twin", Map.of());
            Wait.until("the younger one counts", Duration.ofSeconds(5), () -> !since("twin").equals(first));
            String second = since("twin");
            for (int i = 0; i < 60; i++) { // longer than several heartbeats of both
                assertEquals(second, since("twin"), "the start of the younger one");
                Thread.sleep(50);
            }
            younger.close();
            Wait.until("the older one goes on", Duration.ofSeconds(2), () -> since("twin").equals(first));
            awaitState(one, "twin", "ready", 1_500);
            assertTrue(older.get("/healthz").status() == 200);
        }
    }

    private String since(String name) { return seen(one, name).get("since").getAsString(); }

    @Test void without_PostgreSQL_say_so() throws Exception {
        try (FaultProxy postgres = new FaultProxy(Servers.databasePort());
             Instance broken = begin("broken", Map.of("DB_PORT", "" + postgres.port()))) {
            awaitState(one, broken.name, "ready", 5_000);
            postgres.cut();
            awaitState(one, broken.name, "degraded", 3_000);
        }
    }

    @Test void are_told_to_viewers_when_something_changes() throws Exception {
        try (EventsTest.Subscriber viewer = new EventsTest.Subscriber(one, "")) {
            Wait.until("a first list", () -> !viewer.all("instances").isEmpty());
            try (Instance late = begin("late", Map.of())) {
                Wait.until("the new one", () -> viewer.all("instances").getLast().data().contains(late.name));
            }
            Wait.until("it is gone", () -> {
                Map<String, String> states = new TreeMap<>();
                JsonParser.parseString(viewer.all("instances").getLast().data()).getAsJsonArray().forEach(row ->
                        states.put(row.getAsJsonObject().get("instance").getAsString(),
                                row.getAsJsonObject().get("state").getAsString()));
                return states.get("late").equals("gone");
            });
        }
    }
}
