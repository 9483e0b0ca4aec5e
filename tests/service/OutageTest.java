import com.google.gson.JsonObject;
import org.junit.jupiter.api.Nested;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.EnumSource;
import org.junit.jupiter.params.provider.ValueSource;
import redis.clients.jedis.Jedis;

import java.io.IOException;
import java.net.ConnectException;
import java.time.Duration;
import java.util.*;
import java.util.concurrent.*;
import java.util.concurrent.atomic.AtomicInteger;
import java.util.concurrent.atomic.AtomicReference;
import java.util.stream.IntStream;
import java.util.stream.Stream;

import static java.nio.charset.StandardCharsets.UTF_8;
import static org.junit.jupiter.api.Assertions.*;

/** Outages of PostgreSQL and Redis, graceful shutdown, slow clients, and the batchers. */
@ExtendWith(LogCapture.class)
class OutageTest {
    static final String KEY = "Idempotency-Key";

    enum Fault { CUT, HANG }

    /** An instance on a new database, with a proxy of its own in front of each store. */
    static final class Proxied implements AutoCloseable {
        final FaultProxy postgres = new FaultProxy(Servers.databasePort()), redis = new FaultProxy(Servers.redisPort());
        final String database = Servers.newDatabase();
        final Instance instance;

        Proxied(String name) throws IOException { this(name, true); }

        Proxied(String name, boolean connected) throws IOException {
            if (!connected) {
                postgres.cut();
                redis.cut();
            }
            instance = new Instance(name, database, "DB_PORT", "" + postgres.port(), "REDIS_PORT", "" + redis.port());
            if (!connected) return;
            instance.awaitReady();
            instance.save("a", "before").expect(201);
        }

        static void cause(FaultProxy proxy, Fault fault) throws IOException {
            if (fault == Fault.CUT) proxy.cut();
            else proxy.hang();
        }

        @Override public void close() throws IOException {
            instance.close();
            postgres.close();
            redis.close();
        }
    }

    /** Fails if the response takes longer than the contract promises. */
    static Answer inTime(Callable<Answer> request) throws Exception {
        long begun = System.nanoTime();
        Answer answer = request.call();
        long millis = (System.nanoTime() - begun) / 1_000_000;
        assertTrue(millis < Wait.PROMISED.toMillis(), "expected an answer within 2 s, actual: after " + millis
                + " ms " + answer);
        return answer;
    }

    /** The threads of the instances in this process, by name, without those of the tests and of the JVM. */
    static Map<String, Integer> threads() {
        Map<String, Integer> count = new TreeMap<>();
        for (Thread thread : Thread.getAllStackTraces().keySet())
            if (!thread.getName().matches("(HttpClient|ForkJoinPool|VirtualThread|test-|junit|Read-Poller"
                    + "|Write-Poller|Keep-Alive|Thread-|pool-|Cleaner|process |Common-Cleaner|PostgreSQL-JDBC).*"))
                count.merge(thread.getName(), 1, Integer::sum);
        return count;
    }

    @Nested class While_Redis_is_unavailable {
        @ParameterizedTest @EnumSource(Fault.class) void all_works_but_the_counting(Fault fault) throws Exception {
            try (Proxied proxied = new Proxied("lone")) {
                Instance instance = proxied.instance;
                long before = instance.visits();
                Proxied.cause(proxied.redis, fault);
                assertTrue(inTime(() -> instance.get("/")).expect(200).json().get("visits").isJsonNull());
                inTime(() -> instance.get("/", "Accept", "text/html")).expect(200);
                inTime(() -> instance.get("/api/visits")).unavailable();
                Answer stored = inTime(() -> instance.save("a", "without Redis")).expect(201);
                inTime(() -> instance.get(stored.header("location"))).expect(200);
                inTime(() -> instance.get("/api/messages")).expect(200);
                inTime(() -> instance.get("/healthz")).expect(200);
                JsonObject ready = inTime(() -> instance.get("/readyz")).expect(200).json();
                assertEquals("degraded", ready.get("status").getAsString());
                assertEquals("down", ready.getAsJsonObject("dependencies").get("redis").getAsString());
                assertEquals(0, instance.metric("threefold_store_up{store=\"redis\"}"));
                assertEquals(1, instance.metric("threefold_store_up{store=\"postgres\"}"));
                proxied.redis.mend();
                Wait.until("it counts again", Wait.PROMISED, () -> instance.visits() > before);
                Wait.until("it is ready", Wait.PROMISED, () -> instance.status().equals("ready"));
                instance.get("/api/visits").expect(200);
            }
        }

        @Test void each_outage_and_its_end_is_noticed() throws Exception {
            try (Proxied proxied = new Proxied("lone")) {
                for (int i = 0; i < 3; i++) {
                    proxied.redis.cut();
                    Wait.until("visits are null", Wait.PROMISED, () -> !proxied.instance.counts());
                    proxied.redis.mend();
                    Wait.until("it counts again", Wait.PROMISED, proxied.instance::counts);
                }
            }
        }

        @Test void no_number_is_given_twice_after_connections_are_cut() throws Exception {
            Set<Long> numbers = ConcurrentHashMap.newKeySet();
            try (Proxied proxied = new Proxied("cutter"); Jedis jedis = Servers.jedis()) {
                long before = proxied.instance.total();
                AtomicInteger counted = new AtomicInteger();
                CompletableFuture<Void> cutting = Wait.meanwhile(() -> {
                    for (int i = 0; i < 10; i++) {
                        for (String client : jedis.clientList().split("\n"))
                            if (client.contains("name=threefold-cutter"))
                                try {
                                    jedis.clientKill(client.replaceAll("(?s).*?addr=(\\S+).*", "$1"));
                                } catch (RuntimeException e) { /* it was closed already */ }
                        Wait.until("it counts again", () -> counted.get() > 0);
                        counted.set(0);
                    }
                    return null;
                });
                while (!cutting.isDone()) {
                    Answer answer = proxied.instance.get("/").expect(200);
                    if (answer.json().get("visits").isJsonNull()) continue;
                    assertTrue(numbers.add(answer.json().get("visits").getAsLong()), "given twice: " + answer);
                    counted.incrementAndGet();
                }
                cutting.get(30, TimeUnit.SECONDS);
                Wait.until("all that was acknowledged is counted", () -> proxied.instance.total() >= before
                        + numbers.size());
            }
        }
    }

    @Nested class A_visit_whose_answer_is_lost {
        @Test void is_not_counted_again() throws Exception {
            try (Proxied proxied = new Proxied("forgetful")) {
                long before = proxied.instance.visits();
                proxied.redis.loseResponseTo("INCRBY");
                assertFalse(proxied.instance.counts());
                assertTrue(proxied.redis.hasLost(), "the response of Redis was lost");
                assertEquals(before + 1, Servers.one().total());
            }
        }
    }

    @Nested class While_PostgreSQL_is_unavailable {
        @ParameterizedTest @EnumSource(Fault.class)
        void messages_are_unavailable_and_the_rest_works(Fault fault) throws Exception {
            try (Proxied proxied = new Proxied("lone")) {
                Instance instance = proxied.instance;
                String key = UUID.randomUUID().toString();
                Answer stored = instance.save("a", "kept").expect(201);
                Proxied.cause(proxied.postgres, fault);
                inTime(() -> instance.save("a", "not stored", KEY, key)).unavailable();
                inTime(() -> instance.get("/api/messages")).unavailable();
                inTime(() -> instance.get(stored.header("location"))).unavailable();
                inTime(() -> instance.form("author=a&body=b")).unavailable();
                long visits = inTime(() -> instance.get("/")).expect(200).json().get("visits").getAsLong();
                assertEquals(visits + 1, instance.visits());
                inTime(() -> instance.get("/api/visits")).expect(200);
                inTime(() -> instance.get("/", "Accept", "text/html")).expect(200);
                inTime(() -> instance.get("/healthz")).expect(200);
                Answer ready = inTime(() -> instance.get("/readyz")).expect(200);
                assertEquals("degraded", ready.text("status"));
                assertEquals("down", ready.json().getAsJsonObject("dependencies").get("postgres").getAsString());
                proxied.postgres.mend();
                Wait.until("messages are stored again", Wait.PROMISED, () -> instance.save("a", "back", KEY, "back")
                        .status() / 100 == 2);
                Wait.until("it is ready", Wait.PROMISED, () -> instance.status().equals("ready"));
                assertEquals("kept", instance.get(stored.header("location")).expect(200).text("body"));
                assertEquals(2, instance.save("a", "not stored", KEY, key).status() / 100);
                assertEquals(List.of("1"), Servers.sql(proxied.database,
                        "SELECT count(*) FROM messages WHERE body = 'not stored'"));
            }
        }

        @Test void each_outage_and_its_end_is_noticed() throws Exception {
            try (Proxied proxied = new Proxied("lone")) {
                for (int i = 0; i < 3; i++) {
                    proxied.postgres.cut();
                    Wait.until("it is noticed", Wait.PROMISED, () -> proxied.instance.status().equals("degraded"));
                    proxied.postgres.mend();
                    Wait.until("messages are back", Wait.PROMISED,
                            () -> proxied.instance.get("/api/messages").status() == 200);
                }
            }
        }

        @ParameterizedTest @ValueSource(booleans = {false, true})
        void and_back_after_its_connections_fell_silent_the_first_requests_succeed(boolean refuses) throws Exception {
            try (Proxied proxied = new Proxied("vanished")) {
                String accept = "ALTER DATABASE " + proxied.database + " ALLOW_CONNECTIONS ";
                proxied.instance.save("a", "before").expect(201);
                proxied.instance.get("/api/messages").expect(200);
                proxied.postgres.vanish();
                proxied.instance.awaitDegraded();
                if (refuses) Servers.sql("postgres", accept + "false");
                proxied.postgres.mend();
                if (refuses) {
                    Wait.until("it refuses", () -> LogCapture.all().toString().contains("store_refused"));
                    Servers.sql("postgres", accept + "true");
                }
                Wait.until("it is back", () -> proxied.instance.status().equals("ready"));
                proxied.instance.save("a", "after").expect(201);
                proxied.instance.get("/api/messages").expect(200);
            }
        }

        @Test void two_hundred_requests_at_once_are_answered_in_time_without_more_threads() throws Exception {
            try (Proxied proxied = new Proxied("crowded")) {
                proxied.instance.metric("http_requests_in_flight"); // has a thread of its own
                Map<String, Integer> before = threads(), most = new TreeMap<>();
                proxied.postgres.hang();
                List<Callable<Answer>> requests = new ArrayList<>();
                for (int i = 0; i < 200; i++) {
                    int n = i;
                    requests.add(() -> inTime(() -> n % 2 == 0 ? proxied.instance.save("a", "in a crowd")
                            : proxied.instance.get("/api/messages")));
                }
                CompletableFuture<List<Answer>> answers = Wait.meanwhile(() -> Wait.together(requests));
                Wait.until("all are answered", () -> {
                    boolean done = answers.isDone(); // first, so that the last look is at the end
                    threads().forEach((name, count) -> most.merge(name, count, Math::max));
                    return done;
                });
                for (Answer answer : answers.get()) answer.unavailable();
                assertEquals(before, most);
                proxied.postgres.mend();
                Wait.until("it serves again", Wait.PROMISED,
                        () -> proxied.instance.get("/api/messages").status() == 200);
            }
        }

        @Test void a_locked_table_delays_no_request_that_does_not_need_it() throws Exception {
            try (Proxied proxied = new Proxied("locked")) {
                CompletableFuture<?> owner = Wait.meanwhile(() ->
                        Servers.sql(proxied.database, "BEGIN; LOCK TABLE messages; SELECT pg_sleep(5); COMMIT"));
                Wait.until("it is locked", () -> !Servers.sql(proxied.database,
                        "SELECT 1 FROM pg_locks WHERE mode = 'AccessExclusiveLock' AND relation = "
                                + "'messages'::regclass").isEmpty());
                CompletableFuture<?> reader = Wait.meanwhile(() -> {
                    for (int i = 0; i < 3; i++) inTime(() -> proxied.instance.get("/api/messages").unavailable());
                    return null;
                });
                int counted = 0;
                for (; !owner.isDone(); counted++) inTime(() -> proxied.instance.get("/").expect(200));
                reader.get();
                assertTrue(counted > 100, "visits in 5 s while messages were locked: expected more than 100, saw "
                        + counted);
                Wait.until("messages are back", Wait.PROMISED,
                            () -> proxied.instance.get("/api/messages").status() == 200);
            }
        }

        @Test void a_short_break_between_requests_fails_none() throws Exception {
            try (Proxied proxied = new Proxied("brief")) {
                proxied.postgres.cut();
                proxied.postgres.mend();
                Wait.until("it is ready", Wait.PROMISED, () -> proxied.instance.get("/readyz").status() == 200);
                proxied.instance.save("a", "over a new connection").expect(201);
            }
        }
    }

    @Nested class An_instance_that_starts_before_its_stores {
        @Test void is_not_ready_and_serves_as_soon_as_they_start() throws Exception {
            try (Proxied proxied = new Proxied("early", false)) {
                Instance instance = proxied.instance;
                inTime(() -> instance.get("/healthz")).expect(200);
                assertTrue(inTime(() -> instance.get("/")).expect(200).json().get("visits").isJsonNull());
                inTime(() -> instance.save("a", "too early")).unavailable();
                instance.get("/readyz").expect(503);
                proxied.redis.mend();
                proxied.postgres.mend();
                Wait.until("it is ready", Wait.PROMISED, () -> instance.get("/readyz").expect(200).text("status")
                        .equals("ready"));
                instance.save("a", "in time").expect(201);
                assertTrue(instance.visits() > 0);
            }
        }
    }

    @Nested class A_message_whose_connection_is_lost {
        @ParameterizedTest @ValueSource(booleans = {false, true})
        void between_its_statement_and_the_result_is_stored_once(boolean withKey) throws Exception {
            try (Proxied proxied = new Proxied("loser")) {
                String body = "lost " + UUID.randomUUID();
                proxied.postgres.loseResponseTo(body);
                String[] key = withKey ? new String[] {KEY, body.replace(' ', '-')} : new String[0];
                Answer answer = proxied.instance.save("a", body, key);
                assertTrue(proxied.postgres.hasLost(), "the result of PostgreSQL was lost");
                // With the client's key, the instance cannot know whether its own first try stored the message.
                answer.expect(withKey && answer.status() == 200 ? 200 : 201);
                assertEquals(List.of("" + answer.id()), Servers.sql(proxied.database,
                        "SELECT id FROM messages WHERE body = '" + body + "'"));
            }
        }

        @Test void again_and_again_is_stored_once() throws Exception {
            try (Proxied proxied = new Proxied("victim")) {
                Map<String, Long> acknowledged = new ConcurrentHashMap<>();
                AtomicInteger next = new AtomicInteger();
                CompletableFuture<Void> over = new CompletableFuture<>();
                Callable<Void> writer = () -> {
                    while (!over.isDone()) {
                        String key = "k" + next.incrementAndGet();
                        Wait.until("stored in the end", () -> {
                            Answer answer = proxied.instance.save("a", key, KEY, key);
                            if (answer.status() == 503) answer.unavailable();
                            else acknowledged.put(key, answer.expect(answer.status() == 200 ? 200 : 201).id());
                            return answer.status() != 503;
                        });
                    }
                    return null;
                };
                Callable<Void> killer = () -> {
                    try {
                        for (int i = 0; i < 40; i++) {
                            int seen = acknowledged.size();
                            Servers.sql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                                    + "WHERE application_name = 'threefold victim'");
                            if (i % 8 == 0) Wait.until("some more are stored", () -> acknowledged.size() > seen + 5);
                        }
                        return null;
                    } finally { over.complete(null); }
                };
                Wait.together(List.of(writer, writer, writer, writer, killer));
                Set<String> stored = new HashSet<>(Servers.sql(proxied.database,
                        "SELECT body || ' ' || id FROM messages WHERE body LIKE 'k%'"));
                List<String> all = Servers.sql(proxied.database, "SELECT body FROM messages WHERE body LIKE 'k%'");
                assertEquals(all.stream().distinct().count(), all.size(), "each once");
                acknowledged.forEach((key, id) -> assertTrue(stored.contains(key + ' ' + id), "expected " + key
                        + " as " + id));
                assertEquals(acknowledged.keySet(), new HashSet<>(all), "acknowledged and stored");
            }
        }
    }

    @Nested class An_instance_that_shuts_down {
        @Test void drains_then_closes_its_port_then_completes_requests_in_flight() throws Exception {
            try (Instance instance = new Instance("leaver", Servers.newDatabase(), "DRAIN_MILLIS", "1500");
                 RawConnection slow = instance.connect(); RawConnection idle = instance.connect();
                 EventsTest.Subscriber subscriber = new EventsTest.Subscriber(instance, "")) {
                instance.awaitReady();
                idle.send(HttpTest.request("GET", "/healthz")).read().expect(200);
                byte[] request = HttpTest.post(HttpTest.sized(1_000)).getBytes(UTF_8);
                slow.send(java.util.Arrays.copyOf(request, 500));
                // The slow request, the subscriber, and this one.
                Wait.until("it has begun", () -> instance.metric("http_requests_in_flight") >= 3);
                var closing = Wait.meanwhile(Executors.callable(instance::close));

                Wait.until("it is not ready", () -> instance.raw(HttpTest.request("GET", "/readyz")).status() == 503);
                Answer ready = instance.raw(HttpTest.request("GET", "/readyz")).expect(503);
                assertEquals("draining", ready.text("status"));
                for (Answer still : List.of(idle.send(HttpTest.request("GET", "/")).read().expect(200), ready,
                        instance.raw(HttpTest.post(HttpTest.sized(100))).expect(201),
                        instance.raw(HttpTest.request("GET", "/api/messages")).expect(200)))
                    assertEquals("close", still.header("connection"), "" + still);
                assertTrue(idle.isClosed());
                assertFalse(subscriber.hasEnded(), "the stream goes on until the port closes");

                Wait.until("the port is closed", () -> {
                    try {
                        instance.connect().close();
                        return false;
                    } catch (ConnectException e) { return true; }
                });
                Thread.sleep(1_000);
                assertFalse(closing.isDone(), "it waits for the request in flight");
                slow.send(java.util.Arrays.copyOfRange(request, 500, request.length)).read().expect(201);
                Wait.until("the stream ended", Wait.PROMISED, subscriber::hasEnded);
                closing.get(3, TimeUnit.SECONDS);
                Wait.until("it is in the log", () -> LogCapture.all().stream()
                        .anyMatch(line -> line.contains("\"event\":\"stopped\",\"inFlight\":0")));
            }
        }

        @Test void leaves_no_thread_and_no_connection_behind() throws Exception {
            Servers.one();
            Map<String, Integer> before = threads();
            for (int i = 0; i < 3; i++)
                try (Instance instance = new Instance("tidy")) {
                    instance.awaitReady();
                    instance.save("a", "b").expect(201);
                    instance.get("/", "Accept", "text/html").expect(200);
                }
            Wait.until("its threads have ended", () -> {
                threads().forEach((name, count) -> assertTrue(count <= before.getOrDefault(name, 0), name + " in "
                        + threads() + ", before: " + before));
                return true;
            });
            try (Jedis jedis = Servers.jedis()) {
                Wait.until("its connections to Redis are closed", () -> {
                    assertEquals("", jedis.clientList().lines().filter(line -> line.contains("threefold-tidy"))
                            .collect(java.util.stream.Collectors.joining("; ")));
                    return true;
                });
            }
            Wait.until("its connections to PostgreSQL are closed", () -> {
                assertEquals(List.of("0"), Servers.sql("postgres",
                        "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'threefold tidy'"));
                return true;
            });
        }

        @Test void waits_only_for_a_while_for_a_request_that_does_not_end() throws Exception {
            try (Instance instance = new Instance("patient");
                    RawConnection slow = instance.connect()) {
                instance.awaitReady();
                slow.send(HttpTest.post(HttpTest.sized(1_000)).substring(0, 500));
                Wait.until("it has begun", () -> instance.metric("http_requests_in_flight") >= 2);
                Wait.meanwhile(Executors.callable(instance::close)).get(15, TimeUnit.SECONDS);
            }
        }
    }

    @Nested class Clients_that_do_not_read {
        /** Beyond the buffer budget, large pages get 503, and small responses do not. */
        @Test void cost_others_large_pages_but_not_the_service() throws Exception {
            try (Instance board = new Instance("rude")) {
                String longest = MessagesTest.SMILE.repeat(2_000);
                for (int i = 0; i < 100; i++) board.save("a", longest).expect(201);
                List<RawConnection> readers = new ArrayList<>();
                try {
                    for (int i = 0; i < 60; i++) {
                        readers.add(new RawConnection(board.port, 4_096));
                        readers.getLast().send(HttpTest.request("GET", "/api/messages?limit=100"));
                    }
                    Wait.until("there is no more room", () -> board.get("/api/messages?limit=100").status() == 503);
                    board.get("/api/messages?limit=100").unavailable();
                    double buffered = board.metric("threefold_buffered_bytes");
                    assertTrue(buffered <= 16 * 1024 * 1024, "buffered: " + buffered);
                    board.get("/api/messages?limit=1").expect(200);
                    board.save("a", "still stored").expect(201);
                } finally {
                    for (RawConnection reader : readers) reader.close();
                }
                Wait.until("there is room again", () -> board.get("/api/messages?limit=100").status() == 200);
            }
        }
    }

    @Nested class Clients_that_do_not_end_their_bodies {
        @ParameterizedTest @ValueSource(booleans = {false, true})
        void take_no_more_memory_than_the_budget(boolean chunked) throws Exception {
            try (Instance board = new Instance("patient")) {
                board.awaitReady();
                List<RawConnection> senders = new ArrayList<>();
                try {
                    for (int i = 0; i < 170; i++) {
                        senders.add(board.connect());
                        byte[] body = HttpTest.sized(HttpTest.MAX_BODY);
                        String request = chunked ? HttpTest.chunked(body, 8_000) : HttpTest.post(body);
                        senders.getLast().send(request.substring(0, 500));
                    }
                    Wait.until("there is no more room", () -> board.metric("threefold_buffered_bytes") > 16.5e6);
                    board.post(HttpTest.sized(HttpTest.MAX_BODY)).unavailable();
                } finally {
                    for (RawConnection sender : senders) sender.close();
                }
                Wait.until("there is room again",
                        () -> board.post(HttpTest.sized(HttpTest.MAX_BODY)).status() == 201);
            }
        }
    }

    @Nested class A_batcher {
        private final List<Integer> sizes = Collections.synchronizedList(new ArrayList<>());
        private final CountDownLatch busy = new CountDownLatch(1), gate = new CountDownLatch(1);

        /** Doubles numbers; the first batch waits until the gate opens. */
        private Batcher<Integer, Integer> doubling() {
            return new Batcher<>("doubling", new Metrics(), batch -> {
                sizes.add(batch.size());
                busy.countDown();
                gate.await();
                if (batch.contains(-1)) throw new IllegalStateException("unlucky");
                return batch.stream().map(n -> 2 * n).toList();
            });
        }

        @Test void runs_a_batch_of_one_at_once_when_it_is_idle() throws Exception {
            gate.countDown();
            try (var batcher = doubling()) {
                for (int i = 0; i < 5; i++)
                    assertEquals(2 * i, batcher.submit(i, Runnable::run).get(5, TimeUnit.SECONDS));
                assertEquals(List.of(1, 1, 1, 1, 1), sizes);
            }
        }

        @Test void makes_one_batch_of_what_arrives_while_it_is_busy_and_answers_in_order() throws Exception {
            try (var batcher = doubling()) {
                LinkedBlockingQueue<String> answers = new LinkedBlockingQueue<>();
                batcher.submit(0, Runnable::run).whenComplete((a, failure) -> answers.add("0:" + a));
                busy.await();
                for (int i = 1; i <= 50; i++) {
                    int n = i;
                    batcher.submit(n, Runnable::run).whenComplete((a, failure) -> answers.add(n + ":" + a));
                }
                gate.countDown();
                Wait.until("all are answered", () -> answers.size() == 51);
                assertEquals(List.of(1, 50), sizes);
                assertEquals(IntStream.rangeClosed(0, 50).mapToObj(n -> n + ":" + 2 * n).toList(),
                        new ArrayList<>(answers));
            }
        }

        @Test void fails_all_requests_of_a_failed_batch_and_goes_on() throws Exception {
            try (var batcher = doubling()) {
                LinkedBlockingQueue<String> answers = new LinkedBlockingQueue<>();
                batcher.submit(0, Runnable::run).whenComplete((a, failure) -> answers.add("" + a));
                busy.await();
                for (int n : List.of(1, -1, 2))
                    batcher.submit(n, Runnable::run).whenComplete((a, failure) ->
                            answers.add(a + " " + failure.getMessage()));
                gate.countDown();
                Wait.until("all are answered", () -> answers.size() == 4);
                assertEquals(List.of("0", "null unlucky", "null unlucky", "null unlucky"), new ArrayList<>(answers));
                assertEquals(42, batcher.submit(21, Runnable::run).get(5, TimeUnit.SECONDS));
            }
        }

        @Test void goes_on_after_an_error_that_is_no_exception() throws Exception {
            try (var batcher = new Batcher<Integer, Integer>("erring", new Metrics(), batch -> {
                if (batch.contains(-1)) throw new StackOverflowError();
                return batch;
            })) {
                for (int i = 0; i < 2; i++) {
                    var failed = batcher.submit(-1, Runnable::run);
                    var failure = assertThrows(ExecutionException.class, () -> failed.get(5, TimeUnit.SECONDS));
                    assertTrue(failure.getCause() instanceof StackOverflowError, "" + failure);
                    assertEquals(7, batcher.submit(7, Runnable::run).get(5, TimeUnit.SECONDS));
                }
            }
        }

        /** A connection is opened by the batcher's own thread: an I/O thread has others to serve. */
        @Test void runs_on_its_own_thread_what_would_block_an_IO_thread() throws Exception {
            try (var batcher = new Batcher<Integer, String>("waiting", new Metrics(), batch -> {
                if (batch.contains(-1)) WouldBlock.requireBlockingThread();
                return batch.stream().map(n -> Thread.currentThread().getName()).toList();
            })) {
                for (int i = 0; i < 3; i++) batcher.submit(1, Runnable::run).get(5, TimeUnit.SECONDS);
                assertEquals(Thread.currentThread().getName(),
                        batcher.submit(1, Runnable::run).get(5, TimeUnit.SECONDS));
                assertEquals("waiting", batcher.submit(-1, Runnable::run).get(5, TimeUnit.SECONDS));
            }
        }

        @Test void rejects_more_requests_than_may_wait() throws Exception {
            try (var batcher = doubling()) {
                batcher.submit(0, Runnable::run);
                busy.await();
                List<CompletableFuture<Integer>> waiting = IntStream.rangeClosed(1, 1_024)
                        .mapToObj(i -> batcher.submit(i, Runnable::run)).toList();
                var rejected = batcher.submit(1_025, Runnable::run);
                assertTrue(rejected.isCompletedExceptionally());
                assertTrue(waiting.stream().noneMatch(CompletableFuture::isDone));
                assertTrue(assertThrows(ExecutionException.class, rejected::get).getCause() instanceof
                        Batcher.Overloaded);
                assertThrows(Batcher.Overloaded.class, () -> batcher.call(1_026), "a thread that may block, too");
                gate.countDown();
                for (int i = 0; i < 1_024; i++) assertEquals(2 * (i + 1), waiting.get(i).get(5, TimeUnit.SECONDS));
            }
        }

        @Test void runs_quick_batches_on_the_IO_thread_and_after_a_slow_one_on_its_own() throws Exception {
            AtomicReference<Duration> takes = new AtomicReference<>(Duration.ZERO);
            try (var batcher = new Batcher<Integer, String>("doubling", new Metrics(), batch -> {
                Thread.sleep(takes.get());
                return batch.stream().map(n -> Thread.currentThread().getName()).toList();
            }); IoThread io = new IoThread()) {
                Callable<String> submit = () -> {
                    CompletableFuture<String> answer = new CompletableFuture<>();
                    io.thread.submit(() -> batcher.submit(1, io).thenAccept(answer::complete)).get();
                    return answer.get(5, TimeUnit.SECONDS);
                };
                assertEquals("doubling", submit.call(), "the first one");
                Wait.until("quick ones run on the I/O thread", () -> submit.call().equals("test-io"));
                takes.set(Duration.ofMillis(60));
                submit.call();
                for (int i = 0; i < 3; i++) assertEquals("doubling", submit.call(), "it was slow");
                takes.set(Duration.ZERO);
                Wait.until("it is quick again", () -> submit.call().equals("test-io"));
            }
        }

        /** An I/O thread, as far as a batcher needs one; counts how often the batcher wakes it. */
        private static final class IoThread implements Executor, AutoCloseable {
            final AtomicInteger wakeUps = new AtomicInteger();
            private final ExecutorService thread = Executors.newSingleThreadExecutor(work -> new Thread(work,
                    "test-io"));

            @Override public void execute(Runnable work) {
                if (Thread.currentThread().getName().equals("doubling")) wakeUps.incrementAndGet();
                thread.execute(work);
            }

            @Override public void close() { thread.close(); }
        }

        @Test void wakes_each_IO_thread_once_for_all_of_its_answers() throws Exception {
            try (var batcher = doubling(); IoThread one = new IoThread(); IoThread two = new IoThread()) {
                LinkedBlockingQueue<String> answers = new LinkedBlockingQueue<>();
                batcher.submit(0, Runnable::run).whenComplete((a, failure) -> {});
                busy.await();
                for (IoThread io : List.of(one, two))
                    io.thread.submit(() -> {
                        for (int i = 1; i <= 10; i++) batcher.submit(i, io).whenComplete((a, failure) ->
                                answers.add(Thread.currentThread().getName() + a));
                    }).get();
                for (IoThread io : List.of(one, two)) io.thread.submit(() -> {}).get(); // the end of its turn
                gate.countDown();
                Wait.until("all are answered", () -> answers.size() == 20);
                assertEquals(List.of(1, 20), sizes);
                assertEquals(List.of(1, 1), List.of(one.wakeUps.get(), two.wakeUps.get()));
                assertTrue(answers.stream().allMatch(answer -> answer.startsWith("test-io")),
                        "each on its own thread: " + answers);
            }
        }

        @Test void runs_again_before_later_requests_what_was_too_much_for_one_batch() throws Exception {
            CountDownLatch later = new CountDownLatch(1);
            Executor thread = Runnable::run; // one thread: the order of two is not promised
            try (var batcher = new Batcher<Integer, Integer>("doubling", new Metrics(), batch -> {
                gate.await();
                if (batch.contains(1)) {
                    busy.countDown();
                    later.await();
                }
                sizes.add(Math.min(batch.size(), 4));
                return batch.stream().limit(4).map(n -> 2 * n).toList();
            })) {
                LinkedBlockingQueue<Integer> answers = new LinkedBlockingQueue<>();
                for (int i = 0; i < 11; i++) batcher.submit(i, thread).thenAccept(answers::add);
                gate.countDown();
                busy.await();
                for (int i = 11; i < 14; i++) batcher.submit(i, thread).thenAccept(answers::add);
                later.countDown();
                Wait.until("all are answered", () -> answers.size() == 14);
                assertEquals(IntStream.range(0, 14).mapToObj(n -> 2 * n).toList(), new ArrayList<>(answers));
                assertTrue(sizes.stream().allMatch(size -> size <= 4), "at once: " + sizes);
            }
        }

        @Test void counts_what_it_runs_again_as_waiting() throws Exception {
            LinkedBlockingQueue<Runnable> turns = new LinkedBlockingQueue<>();
            Executor oneTurn = work -> {
                if (Thread.currentThread().getName().equals("halving")) work.run();
                else turns.add(work);
            };
            try (var batcher = new Batcher<Integer, Integer>("halving", new Metrics(), batch -> {
                if (batch.contains(-1)) {
                    busy.countDown();
                    gate.await();
                }
                return batch.subList(0, (batch.size() + 1) / 2);
            })) {
                var answers = IntStream.range(0, 100).mapToObj(i -> batcher.submit(i, oneTurn)).toList();
                turns.take().run();
                for (var answer : answers) answer.get(5, TimeUnit.SECONDS);
                Wait.meanwhile(() -> batcher.submit(-1, Runnable::run));
                busy.await();
                for (int i = 0; i < 1_024; i++) batcher.submit(i, Runnable::run);
                assertTrue(batcher.submit(0, Runnable::run).isCompletedExceptionally());
                gate.countDown();
            }
        }

        /** Otherwise answers would pile up where an I/O thread is slow to take them. */
        @Test void starts_no_third_batch_before_the_answers_of_the_first_are_taken() throws Exception {
            LinkedBlockingQueue<Runnable> replies = new LinkedBlockingQueue<>();
            Executor slow = work -> {
                if (Thread.currentThread().getName().equals("doubling")) replies.add(work);
                else work.run();
            };
            AtomicInteger begun = new AtomicInteger();
            try (var batcher = new Batcher<Integer, Integer>("doubling", new Metrics(), batch -> {
                begun.incrementAndGet();
                Thread.sleep(50); // too long for the thread that submits
                return batch;
            })) {
                for (int i = 1; i <= 2; i++) {
                    batcher.submit(i, slow);
                    int batches = i;
                    Wait.until("a reply waits", () -> replies.size() == batches);
                }
                batcher.submit(3, slow);
                Thread.sleep(200);
                assertEquals(2, begun.get());
                replies.take().run();
                Wait.until("the third follows", () -> begun.get() == 3);
            }
        }

        @Test void ends_its_thread_when_it_is_closed() {
            var batcher = doubling();
            batcher.close();
            Wait.until("its thread has ended", () -> !threads().containsKey("doubling"));
        }
    }

    @Nested class More_requests_than_may_wait {
        @Test void get_503_with_the_time_of_a_retry() throws Exception {
            try (Proxied proxied = new Proxied("full")) {
                proxied.postgres.hang();
                List<Callable<Answer>> requests = Collections.nCopies(1_300, () ->
                        proxied.instance.get("/api/messages?limit=1"));
                Map<Integer, Integer> byStatus = new TreeMap<>();
                for (Answer answer : Wait.together(requests)) byStatus.merge(answer.unavailable().status(), 1,
                        Integer::sum);
                assertEquals(Map.of(503, 1_300), byStatus);
                proxied.postgres.mend();
                Wait.until("it serves again", Wait.PROMISED, () -> proxied.instance.get("/api/messages?limit=1")
                        .status() == 200);
            }
        }
    }
}
