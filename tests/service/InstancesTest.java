import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.extension.ExtendWith;

import java.io.IOException;
import java.time.Duration;
import java.time.Instant;
import java.util.*;
import java.util.concurrent.CompletableFuture;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

/** Membership: each instance lists all others with their status. */
@ExtendWith(LogCapture.class)
@TestInstance(TestInstance.Lifecycle.PER_CLASS)
class InstancesTest {
    private final FaultProxy proxy = new FaultProxy(Servers.redisPort());
    private final Instance one = start("one");
    private final Instance other = start("other", "REDIS_PORT", "" + proxy.port());

    InstancesTest() throws IOException {}

    /** In a database of Redis of their own, without the instances of other tests. */
    private static Instance start(String name, String... namesAndValues) {
        return new Instance(name, Servers.newDatabase(), Caller.and(namesAndValues, "REDIS_DB", "8"));
    }

    @AfterAll void close() throws IOException {
        other.close();
        one.close();
        proxy.close();
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

    @Test void are_listed_alike_by_each() {
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

    @Test void publish_their_requests_per_second() {
        awaitState(one, "other", "ready", 5_000);
        Wait.until("twenty or more a second", Duration.ofSeconds(5), () -> {
            for (int i = 0; i < 40; i++) other.get("/healthz");
            return seen(one, "other").get("requestsPerSecond").getAsLong() >= 20;
        });
        Wait.until("nothing to do", Duration.ofSeconds(5),
                () -> seen(one, "other").get("requestsPerSecond").getAsLong() == 0);
    }

    @Test void without_heartbeats_are_silent_then_gone_and_back_at_once() throws Exception {
        awaitState(one, "other", "ready", 5_000);
        proxy.cut();
        awaitState(one, "other", "silent", 2_000);
        assertTrue(seen(one, "other").get("requestsPerSecond").isJsonNull());
        awaitState(other, "one", "unknown", 2_000); // it knows that its subscription is lost
        awaitState(other, "other", "unknown", 2_000);
        assertEquals("ready", state(one, "one"));
        awaitState(one, "other", "gone", 10_500);
        proxy.mend();
        awaitState(one, "other", "ready", 1_500);
        awaitState(other, "one", "ready", 1_500); // not silent, nor gone: it was not subscribed
    }

    /** Its subscription is open and gives nothing, which says nothing of the others. */
    @Test void are_unknown_while_redis_hangs() throws Exception {
        awaitState(other, "one", "ready", 5_000);
        proxy.hang();
        awaitState(other, "one", "unknown", 4_000);
        for (int i = 0; i < 20; i++) {
            assertEquals("unknown", state(other, "one"));
            Thread.sleep(100);
        }
        proxy.mend();
        awaitState(other, "one", "ready", 3_000);
    }

    /** After a new subscription, the status of a dead instance is unknown until it counts as silent. */
    @Test void that_are_dead_are_not_ready_after_a_new_subscription() throws Exception {
        try (FaultProxy own = new FaultProxy(Servers.redisPort());
             Instance mute = start("mute", "REDIS_PORT", "" + own.port())) {
            awaitState(other, mute.name, "ready", 5_000);
            own.cut();
            awaitState(other, mute.name, "silent", 3_000);
            proxy.cut();
            awaitState(other, "one", "unknown", 2_000);
            proxy.mend();
            awaitState(other, "one", "ready", 3_000);
            for (int i = 0; i < 200; i++) {
                assertTrue(!state(other, mute.name).equals("ready"), "it publishes nothing");
                Thread.sleep(10);
            }
        }
    }

    @Test void that_shut_down_are_draining_then_gone() throws Exception {
        Instance stopping = start("stopping", "DRAIN_MILLIS", "1500");
        awaitState(one, "stopping", "ready", 5_000);
        CompletableFuture<Void> closed = Wait.meanwhile(() -> {
            stopping.close();
            return null;
        });
        awaitState(one, "stopping", "draining", 1_500);
        closed.get();
        awaitState(one, "stopping", "gone", 500);
    }

    /** As in a rolling update, where the new one starts before the old one stops. */
    @Test void with_one_name_are_the_younger_one_until_it_is_gone() throws Exception {
        try (Instance older = start("twin")) {
            awaitState(one, "twin", "ready", 5_000);
            String first = since("twin");
            Instance younger = start("twin");
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

    /** A subscription that is younger has missed heartbeats, and would let the counts of living instances go. */
    @Test void that_live_are_not_known_before_a_minute_of_heartbeats() throws Exception {
        try (Redis redis = new Redis(Config.from(Servers.environment("none")))) {
            Membership membership = new Membership(redis);
            membership.setSubscribed(true);
            membership.onHeartbeat(new InstanceStatus("young", InstanceStatus.READY, Instant.now().toString(),
                    Service.VERSION, 0L).json());
            assertEquals(List.of("young"), membership.all().stream().map(InstanceStatus::instance).toList());
            assertEquals(Set.of(), membership.recentNames());
        }
    }

    @Test void are_listed_only_with_what_an_instance_publishes() throws Exception {
        try (Redis redis = new Redis(Config.from(Servers.environment("none")))) {
            Membership membership = new Membership(redis);
            String since = Instant.now().toString();
            for (InstanceStatus odd : List.of(new InstanceStatus("<b>", InstanceStatus.READY, since, "1", 0L),
                    new InstanceStatus("odd", "asleep", since, "1", 0L),
                    new InstanceStatus("odd", InstanceStatus.SILENT, since, "1", 0L),
                    new InstanceStatus("odd", InstanceStatus.READY, "today", "1", 0L),
                    new InstanceStatus("odd", InstanceStatus.READY, since, null, 0L)))
                membership.onHeartbeat(odd.json());
            assertEquals(List.of(), membership.all());
        }
    }

    @Test void are_a_thousand_at_most_which_stay_up_to_date() throws Exception {
        try (Redis redis = new Redis(Config.from(Servers.environment("none")))) {
            Membership membership = new Membership(redis);
            membership.setSubscribed(true);
            InstanceStatus first = new InstanceStatus("first", InstanceStatus.READY, Instant.now().toString(), "1", 0L);
            membership.onHeartbeat(first.json());
            for (int i = 0; i < 1_000; i++)
                membership.onHeartbeat(new InstanceStatus("i" + i, first.state(), first.since(), "1", 0L).json());
            membership.onHeartbeat(first.as(InstanceStatus.DRAINING).json());
            assertEquals(1_000, membership.all().size());
            assertTrue(membership.all().contains(first.as(InstanceStatus.DRAINING)), "" + first);
        }
    }

    private String since(String name) { return seen(one, name).get("since").getAsString(); }

    @Test void without_PostgreSQL_are_degraded() throws Exception {
        try (FaultProxy postgres = new FaultProxy(Servers.databasePort());
             Instance broken = start("broken", "DB_PORT", "" + postgres.port())) {
            awaitState(one, broken.name, "ready", 5_000);
            postgres.cut();
            awaitState(one, broken.name, "degraded", 3_000);
        }
    }

    @Test void are_sent_to_subscribers_when_one_changes() throws Exception {
        try (EventsTest.Subscriber subscriber = new EventsTest.Subscriber(one, "")) {
            Wait.until("a first list", () -> !subscriber.all("instances").isEmpty());
            try (Instance late = start("late")) {
                Wait.until("the new one", () -> subscriber.all("instances").getLast().data().contains(late.name));
            }
            Wait.until("it is gone", () -> {
                Map<String, String> states = new TreeMap<>();
                JsonParser.parseString(subscriber.all("instances").getLast().data()).getAsJsonArray().forEach(row ->
                        states.put(row.getAsJsonObject().get("instance").getAsString(),
                                row.getAsJsonObject().get("state").getAsString()));
                return states.get("late").equals("gone");
            });
        }
    }
}
