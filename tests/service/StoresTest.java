import com.google.gson.JsonParser;
import org.junit.jupiter.api.Assumptions;
import org.junit.jupiter.api.BeforeAll;
import org.junit.jupiter.api.Nested;
import org.junit.jupiter.api.Test;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;
import redis.clients.jedis.Jedis;

import java.io.IOException;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.sql.Connection;
import java.sql.DriverManager;
import java.sql.SQLException;
import java.time.Duration;
import java.util.ArrayList;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Set;
import java.util.concurrent.Callable;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertFalse;
import static org.junit.jupiter.api.Assertions.assertThrows;
import static org.junit.jupiter.api.Assertions.assertTrue;

/** Stores that refuse, are slow, may not be written to, want TLS, were made by an earlier version,
        or sit behind a pooler. */
@ExtendWith(LogCapture.class)
class StoresTest {
    /** A board whose database is used as somebody with few rights. */
    private static Map<String, String> as(String role, String database) {
        Map<String, String> environment = new HashMap<>(Servers.environment(database));
        environment.putAll(Map.of("DB_USER", role, "DB_PASS", role));
        return environment;
    }

    private static Map<String, String> with(String database, String... namesAndValues) {
        Map<String, String> environment = new HashMap<>(Servers.environment(database));
        for (int i = 0; i < namesAndValues.length; i += 2) environment.put(namesAndValues[i], namesAndValues[i + 1]);
        return environment;
    }

    private static void cutConnections(String database) {
        Servers.sql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '" + database
                + "'");
    }

    @Nested class A_PostgreSQL {
        @Test void in_which_it_may_make_no_table_is_used_once_it_may() {
            String database = Servers.newDatabase();
            Servers.sql(database, "CREATE ROLE poor LOGIN PASSWORD 'poor'; REVOKE CREATE ON SCHEMA public FROM public");
            try (Instance board = new Instance("poor", as("poor", database))) {
                board.say("a", "no table").unavailable();
                assertEquals("starting", board.get("/readyz").expect(503).text("status"));
                Servers.sql(database, "GRANT CREATE ON SCHEMA public TO poor");
                Wait.until("it makes its table", Wait.PROMISED, () -> board.get("/readyz").status() == 200);
                Wait.until("it stores", Wait.PROMISED, () -> board.say("a", "a table").status() == 201);
            }
        }

        @Test void that_became_read_only_is_left_for_one_that_is_not() {
            String database = Servers.newDatabase();
            try (Instance board = new Instance("demoted", Servers.environment(database))) {
                board.say("a", "before").expect(201);
                Servers.sql("postgres", "ALTER DATABASE " + database + " SET default_transaction_read_only = on");
                cutConnections(database);
                Wait.until("it can't be written to", () -> board.say("a", "lost").status() == 503);
                Servers.sql("postgres", "ALTER DATABASE " + database + " RESET default_transaction_read_only");
                Wait.until("it writes on a new connection", Wait.PROMISED, () -> board.say("a", "after")
                        .status() == 201);
            }
        }

        @Test void that_waits_for_a_standby_keeps_no_session_for_each_try() throws Exception {
            Embedded own = new Embedded(ConfigurationTest.config("DATA_DIR", Servers.FOLDER.resolve("standby")
                    .toString(), "REDIS_HOST", "none"));
            try {
                Map<String, String> to = own.start(Map.of("REDIS_HOST", "none"));
                int port = Integer.parseInt(to.get("DB_PORT"));
                String url = "jdbc:postgresql://127.0.0.1:" + port + "/postgres";
                try (Instance board = new Instance("standby", with("postgres", "DB_PORT", "" + port, "DB_PASS",
                        to.get("DB_PASS")));
                     Connection look = DriverManager.getConnection(url, "postgres", to.get("DB_PASS"))) {
                    board.say("a", "alone").expect(201);
                    look.createStatement().execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
                    look.createStatement().execute("SELECT pg_reload_conf()");
                    Wait.until("it waits for one", () -> board.say("a", "not safe").status() == 503);
                    for (int i = 0; i < 4; i++) {
                        board.say("a", "not safe either " + i).unavailable();
                        board.get("/api/messages").expect(200);
                    }
                    var row = look.createStatement().executeQuery(
                            "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'");
                    row.next();
                    assertTrue(row.getInt(1) <= 1, "expected one session at most that waits on, saw " + row.getInt(1));
                    isInTheWayWhenItWaitsForLong(DriverManager.getConnection(url, "postgres", to.get("DB_PASS")),
                            with("postgres", "DB_PORT", "" + port, "DB_PASS", to.get("DB_PASS"), "INSTANCE_ID",
                                    "replaced"));
                    look.createStatement().execute("ALTER SYSTEM RESET synchronous_standby_names");
                    look.createStatement().execute("SELECT pg_reload_conf()");
                    Wait.until("it stores again", Wait.PROMISED, () -> board.say("a", "safe").status() == 201);
                }
            } finally { own.close(); }
        }

        /** The instance that is being replaced has the same name, and each of its commits waits for a moment. */
        private static void isInTheWayWhenItWaitsForLong(Connection other, Map<String, String> environment)
                throws Exception {
            Config config = Config.from(environment);
            other.createStatement().execute("SET application_name = 'threefold replaced'");
            var waits = Wait.meanwhile(() -> other.createStatement().execute("CREATE TABLE waits ()"));
            Thread.sleep(300);
            try (Postgres postgres = new Postgres(config)) {
                var writes = postgres.session(Messages::requireNoStuckCommit);
                assertEquals("in", writes.attempt(connection -> "in"), "a commit of this moment is in nobody's way");
            }
            Thread.sleep(1_000);
            try (Postgres postgres = new Postgres(config)) {
                var writes = postgres.session(Messages::requireNoStuckCommit);
                assertThrows(SQLException.class, () -> writes.attempt(connection -> true));
            }
            assertFalse(waits.isDone(), "it waits");
        }

        @Test void that_ends_all_sessions_fails_no_request() {
            String database = Servers.newDatabase();
            try (Instance board = new Instance("ended", Servers.environment(database))) {
                board.say("a", "before").expect(201);
                for (int i = 0; i < 3; i++) {
                    cutConnections(database);
                    board.say("a", "on a new connection").expect(201);
                    cutConnections(database);
                    board.get("/api/messages").expect(200);
                }
            }
        }

        @Test void that_remarks_on_something_has_stored_it() {
            String database = Servers.newDatabase();
            try (Instance board = new Instance("remarks", Servers.environment(database))) {
                board.awaitReady();
                Servers.sql(database, "CREATE FUNCTION remark() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN "
                        + "RAISE NOTICE ''seen''; RAISE WARNING ''must be vacuumed''; RETURN NEW; END'; "
                        + "CREATE TRIGGER remark "
                        + "BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION remark()");
                board.say("a", "stored").expect(201);
                board.say("a", "with a key", "Idempotency-Key", "k").expect(201);
                board.say("a", "with a key", "Idempotency-Key", "k").expect(200);
                assertEquals("ready", OutageTest.status(board));
            }
        }

        @Test void that_refuses_a_message_refuses_no_other_one() throws Exception {
            String database = Servers.newDatabase();
            try (Instance board = new Instance("policy", Servers.environment(database))) {
                board.awaitReady();
                Servers.sql(database, "CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN "
                        + "IF NEW.author = ''bad'' THEN RAISE EXCEPTION ''no''; END IF; "
                        + "IF NEW.author = ''odd'' THEN RETURN NULL; END IF; RETURN NEW; END'; "
                        + "CREATE TRIGGER judge BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION judge()");
                List<Callable<Answer>> posts = new ArrayList<>();
                for (int i = 0; i < 400; i++) {
                    String author = i % 50 == 7 ? "bad" : i % 50 == 9 ? "odd" : "good", body = "" + i;
                    posts.add(() -> board.say(author, body));
                }
                Map<String, Long> answers = Wait.together(posts).stream().collect(
                        Collectors.groupingBy(answer -> "" + answer.status(), Collectors.counting()));
                assertEquals(Map.of("201", 384L, "503", 16L), answers);
                assertEquals("ready", OutageTest.status(board));
            }
        }

        /** A connection that hangs, as by a firewall that forgot it, is no server that hangs. */
        @Test void one_of_whose_connections_hangs_keeps_the_others() throws Exception {
            String database = Servers.newDatabase();
            try (Instance board = new Instance("stuck", Servers.environment(database))) {
                board.awaitReady();
                board.say("a", "b").expect(201);
                board.get("/api/messages").expect(200);
                String ours = "SELECT pid FROM pg_stat_activity WHERE application_name = 'threefold stuck' AND query ";
                String writes = Servers.sql(database, ours + "LIKE '%INSERT INTO messages%'").getFirst();
                List<String> others = Servers.sql(database, ours + "NOT LIKE '%INSERT INTO messages%' ORDER BY pid");
                kill("STOP", writes);
                try {
                    var stuck = Wait.meanwhile(() -> board.say("a", "nobody hears"));
                    while (!stuck.isDone()) {
                        board.get("/api/messages").expect(200);
                        Thread.sleep(10);
                    }
                    stuck.get().unavailable();
                    for (int i = 0; i < 50; i++) {
                        board.get("/api/messages").expect(200);
                        Thread.sleep(10);
                    }
                    board.say("a", "on a new connection").expect(201);
                    List<String> after = Servers.sql(database, ours + "NOT LIKE '%INSERT INTO messages%' ORDER BY pid");
                    assertEquals(others, after, "the others stay open");
                } finally { kill("CONT", writes); }
            }
        }

        private static void kill(String signal, String pid) throws Exception {
            new ProcessBuilder("kill", "-" + signal, pid).start().waitFor();
        }

        @Test void that_lets_go_of_a_commit_before_a_standby_has_it_has_not_stored_it() throws Exception {
            Embedded own = new Embedded(ConfigurationTest.config("DATA_DIR", Servers.FOLDER.resolve("let-go")
                    .toString(), "REDIS_HOST", "none"));
            try {
                Map<String, String> to = own.start(Map.of("REDIS_HOST", "none"));
                int port = Integer.parseInt(to.get("DB_PORT"));
                try (Instance board = new Instance("let-go", with("postgres", "DB_PORT", "" + port, "DB_PASS",
                        to.get("DB_PASS")));
                     Connection look = DriverManager.getConnection("jdbc:postgresql://127.0.0.1:" + port + "/postgres",
                             "postgres", to.get("DB_PASS"));
                     var work = look.createStatement()) {
                    board.say("a", "alone").expect(201);
                    work.execute("ALTER DATABASE postgres SET client_min_messages = error");
                    work.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                            + "WHERE application_name LIKE 'threefold%'");
                    // The remark of a trigger comes before the one that matters.
                    work.execute("CREATE FUNCTION remark() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE WARNING "
                            + "''first''; RETURN NEW; END'; CREATE TRIGGER remark BEFORE INSERT ON messages "
                            + "FOR EACH ROW EXECUTE FUNCTION remark()");
                    work.execute("ALTER SYSTEM SET synchronous_standby_names = 'nobody'");
                    work.execute("SELECT pg_reload_conf()");
                    Wait.until("a commit that waits is cancelled and answered with 503", () -> {
                        var answer = Wait.meanwhile(() -> board.say("a", "nobody else has it"));
                        boolean cancelled = false;
                        while (!answer.isDone())
                            try (var row = work.executeQuery("SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
                                    + "WHERE wait_event = 'SyncRep'")) { cancelled |= row.next(); }
                        assertEquals(503, answer.get().status(), "" + answer.get());
                        return cancelled;
                    });
                    work.execute("ALTER SYSTEM RESET synchronous_standby_names");
                    work.execute("SELECT pg_reload_conf()");
                }
            } finally { own.close(); }
        }

        @Test void in_which_it_may_only_read_is_up() throws Exception {
            String database = Servers.newDatabase();
            try (FaultProxy cable = new FaultProxy(Servers.databasePort());
                 Instance owner = new Instance("owner", Servers.environment(database))) {
                owner.say("a", "to be read").expect(201);
                Servers.sql(database, "CREATE ROLE reader LOGIN PASSWORD 'reader'; "
                        + "ALTER ROLE reader SET default_transaction_read_only = on; GRANT ALL ON messages TO reader");
                Map<String, String> environment = new HashMap<>(as("reader", database));
                environment.put("DB_PORT", "" + cable.port());
                try (Instance board = new Instance("reader", environment);
                     EventsTest.Subscriber viewer = new EventsTest.Subscriber(board, "")) {
                    board.awaitReady();
                    for (int i = 0; i < 60; i++) {
                        board.say("a", "may not be written").unavailable();
                        assertEquals("ready", OutageTest.status(board), "after POST " + i);
                        board.get("/api/messages").expect(200);
                    }
                    viewer.awaits(owner.say("a", "still told").expect(201));
                    assertFalse(LogCapture.all().toString().contains("store_unavailable"), "" + LogCapture.last(5));
                }
            }
        }

        @Test void whose_password_has_changed_lets_connections_go_on_that_are_open() {
            String database = Servers.newDatabase();
            Servers.sql(database, "CREATE ROLE changing LOGIN PASSWORD 'changing'; "
                    + "GRANT ALL ON SCHEMA public TO changing");
            try (Instance board = new Instance("changing", as("changing", database))) {
                board.awaitReady();
                board.say("a", "before").expect(201);
                board.get("/api/messages").expect(200);
                Servers.sql(database, "ALTER ROLE changing PASSWORD 'another'");
                Servers.sql(database, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        + "WHERE usename = 'changing' AND query LIKE '%INSERT INTO messages%'");
                for (int i = 0; i < 20; i++) {
                    board.say("a", "not let in").unavailable();
                    board.get("/api/messages").expect(200);
                    assertEquals("ready", OutageTest.status(board));
                }
                Servers.sql(database, "ALTER ROLE changing PASSWORD 'changing'");
                Wait.until("it is let in again", Wait.PROMISED, () -> board.say("a", "after").status() == 201);
            }
        }

        /** Where a retry meets the first try, a stricter isolation fails one of the two. */
        @Test void whose_default_is_a_stricter_isolation_stores_each_key_once() throws Exception {
            String database = Servers.newDatabase();
            Servers.sql("postgres", "ALTER DATABASE " + database
                    + " SET default_transaction_isolation = 'serializable'");
            try (Instance one = new Instance("strict1", Servers.environment(database));
                 Instance other = new Instance("strict2", Servers.environment(database))) {
                one.awaitReady();
                other.awaitReady();
                for (int round = 0; round < 20; round++) {
                    List<Callable<Answer>> tries = new ArrayList<>();
                    for (int i = 0; i < 8; i++) {
                        Instance board = i % 2 == 0 ? one : other;
                        String key = "k" + round;
                        tries.add(() -> board.say("a", "once", "Idempotency-Key", key));
                    }
                    for (Answer answer : Wait.together(tries))
                        assertTrue(answer.status() == 200 || answer.status() == 201, "" + answer);
                }
                assertEquals(List.of("20"), Servers.sql(database, "SELECT count(*) FROM messages"));
            }
        }

        @Test void in_which_another_program_has_such_a_table_is_left_as_it_is() {
            String database = Servers.newDatabase();
            Servers.sql(database, "CREATE TABLE messages (id bigint PRIMARY KEY, subject text)");
            try (Instance board = new Instance("guest", Servers.environment(database))) {
                board.say("a", "b").unavailable();
                Wait.until("it says why", () -> LogCapture.all().toString().contains("another program's"));
                assertEquals("starting", board.get("/readyz").expect(503).text("status"));
                assertEquals(List.of("2"), Servers.sql(database,
                        "SELECT count(*) FROM pg_attribute WHERE attrelid = 'messages'::regclass AND attnum > 0"));
            }
        }

        /** The names that Java and a server know differ; the driver sends Java's, and an unknown one is refused. */
        @Test void is_told_no_time_zone_that_it_may_not_know() throws Exception {
            String database = Servers.newDatabase();
            try (Program board = Program.java(with(database, "TZ", "Asia/Calcutta"))) {
                Wait.until("it serves", Duration.ofSeconds(20), () -> board.get("/readyz").status() == 200);
                notes(database, "TimeZone");
                board.say("a", "b").expect(201);
                assertEquals(List.of("UTC"), Servers.sql(database, "SELECT setting FROM seen"));
            }
        }

        @Test void that_is_a_standby_is_no_primary() throws Exception {
            Path copy = Servers.FOLDER.resolve("copy");
            try (Standby standby = new Standby(copy);
                 Instance board = new Instance("stale", with("postgres", "DB_PORT", "" + standby.port))) {
                board.get("/api/messages").unavailable();
                assertEquals("starting", board.get("/readyz").expect(503).text("status"));
                Wait.until("it says why", () -> LogCapture.all().toString().contains("it is a standby"));
            }
        }

        @Test void of_another_encoding_is_not_used() {
            Servers.sql("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'");
            try (Instance board = new Instance("latin", Servers.environment("latin"))) {
                board.say("a", "no place for an emoji").unavailable();
                Wait.until("it says why", () -> LogCapture.all().stream()
                        .anyMatch(line -> line.contains("LATIN1") && line.contains("needs UTF8")));
            }
        }

        @Test void in_the_middle_of_a_long_statement_is_left_at_once() throws Exception {
            Config config = Config.from(Servers.environment(Servers.newDatabase()));
            Postgres postgres = new Postgres(config);
            var session = postgres.session(connection -> null);
            var statement = Wait.meanwhile(() -> session.attempt(connection -> {
                connection.setNetworkTimeout(Runnable::run, 60_000);
                return connection.createStatement().execute("SET statement_timeout = 0; SELECT pg_sleep(20)");
            }));
            Thread.sleep(500);
            long began = System.nanoTime();
            postgres.close();
            assertThrows(Exception.class, statement::get);
            assertTrue(System.nanoTime() - began < 5_000_000_000L, "it waited for the statement");
        }

        @Test void that_refuses_the_password_is_not_asked_ten_times_a_second() throws Exception {
            try (FaultProxy cable = new FaultProxy(Servers.databasePort()); Instance board = new Instance("guessing",
                    with(Servers.newDatabase(), "DB_PORT", "" + cable.port(), "DB_PASS", "wrong"))) {
                board.say("a", "nobody lets it in").unavailable();
                Wait.until("it was asked", () -> cable.accepted() > 0);
                int before = cable.accepted();
                Thread.sleep(3_000);
                assertTrue(cable.accepted() - before <= 4, "expected one try a second, actual: "
                        + (cable.accepted() - before) + " in three");
            }
        }

        @Test void that_is_slow_to_write_keeps_nobody_from_reading() throws Exception {
            String database = Servers.newDatabase();
            try (Instance board = new Instance("slow-disk", Servers.environment(database))) {
                board.say("a", "quick").expect(201);
                Servers.sql(database, "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS "
                        + "'BEGIN PERFORM pg_sleep(5); RETURN NEW; END'; "
                        + "CREATE TRIGGER dawdle BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION dawdle()");
                for (int i = 0; i < 3; i++) {
                    var slow = Wait.meanwhile(() -> board.say("a", "slow"));
                    while (!slow.isDone()) {
                        board.get("/api/messages").expect(200);
                        board.get("/readyz").expect(200);
                        Thread.sleep(20);
                    }
                    slow.get().unavailable();
                }
            }
        }

        /** From now on the database writes into its table `seen` what this setting is when a message is committed. */
        private static void notes(String database, String setting) {
            Servers.sql(database, "CREATE TABLE seen (setting text); CREATE FUNCTION look() RETURNS trigger "
                    + "LANGUAGE plpgsql AS 'BEGIN INSERT INTO seen VALUES (current_setting(''" + setting + "'')); "
                    + "RETURN NEW; END'; CREATE CONSTRAINT TRIGGER look AFTER INSERT ON messages DEFERRABLE "
                    + "INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION look()");
        }

        @Test void whose_default_is_not_to_wait_for_the_disk_waits_for_it() {
            String database = Servers.newDatabase();
            Servers.sql("postgres", "ALTER DATABASE " + database + " SET synchronous_commit = off");
            try (Instance board = new Instance("careful", Servers.environment(database))) {
                board.awaitReady();
                notes(database, "synchronous_commit");
                board.say("a", "is it safe?").expect(201);
                assertEquals(List.of("on"), Servers.sql(database, "SELECT setting FROM seen"));
            }
        }

        /** The numbers of transactions begin anew where a dump is read in: those in the rows lie in the future. */
        @Test void that_was_restored_from_a_dump_tells_its_messages() throws Exception {
            String database = Servers.newDatabase();
            Servers.sql(database, Files.readString(Program.root().resolve("init.sql"))
                    + "; INSERT INTO messages (author, body, instance, request_key, tx) VALUES ('a', 'b', 'c', "
                            + "'d', '99999999999')"
                    // As many rows: it takes longer than any statement of a request may.
                    + "; CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS "
                            + "$$ BEGIN PERFORM pg_sleep(1.5); RETURN NEW; END $$"
                    + "; CREATE TRIGGER slow BEFORE UPDATE ON messages FOR EACH ROW "
                            + "WHEN (OLD.tx IS DISTINCT FROM NEW.tx) EXECUTE FUNCTION slow()");
            try (Instance board = new Instance("restored", Servers.environment(database));
                 EventsTest.Subscriber viewer = new EventsTest.Subscriber(board, "?after=0")) {
                Wait.until("it is told", () -> viewer.ids().size() == 1);
                viewer.awaits(board.say("a", "and what is new as well").expect(201));
                viewer.checkInTurn();
            }
        }

        /** As a large table may take when the schema changes. */
        @Test void whose_table_takes_long_to_change_keeps_no_request_waiting() throws Exception {
            String database = Servers.newDatabase();
            Servers.sql(database, "CREATE FUNCTION slow() RETURNS event_trigger LANGUAGE plpgsql AS "
                    + "$$ BEGIN PERFORM pg_sleep(5); END $$; CREATE EVENT TRIGGER slow ON ddl_command_start "
                    + "WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION slow()");
            long began = System.nanoTime();
            try (Postgres postgres = new Postgres(Config.from(Servers.environment(database)))) {
                Messages messages = new Messages(postgres, "reader", new Metrics());
                assertThrows(StoreException.class, () -> messages.pages(List.of(PageQuery.NEWEST)));
            }
            assertTrue(System.nanoTime() - began < 2_500_000_000L, "a reader makes no schema");
            try (Instance board = new Instance("changing", Servers.environment(database))) {
                List<Callable<Boolean>> requests = new ArrayList<>();
                for (int i = 0; i < 10; i++) {
                    requests.add(() -> quick(() -> board.get("/api/messages")));
                    requests.add(() -> quick(() -> board.say("a", "b")));
                }
                assertTrue(Wait.together(requests).stream().allMatch(is -> is), "within 2.5 s: 200, 201 or 503");
                board.awaitReady();
                board.say("a", "b").expect(201);
            }
        }
        private static boolean quick(Callable<Answer> request) throws Exception {
            long began = System.nanoTime();
            boolean fair = Set.of(200, 201, 503).contains(request.call().status());
            return fair && System.nanoTime() - began < 2_500_000_000L;
        }

        @Test void on_one_of_several_hosts_is_found() throws Exception {
            String hosts = "127.0.0.1:" + Servers.freePort() + ",127.0.0.1:" + Servers.databasePort();
            try (Instance board = new Instance("several", with(Servers.newDatabase(), "DB_HOST", hosts))) {
                board.awaitReady();
                board.say("a", "found").expect(201);
            }
        }
    }

    @Nested class A_PostgreSQL_with_TLS {
        private static Path folder;

        @BeforeAll static void certificates() throws Exception {
            folder = Files.createDirectories(Servers.FOLDER.resolve("tls"));
            run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca",
                    "-keyout", "ca.key", "-out", "ca.crt");
            run("openssl", "x509", "-in", "ca.crt", "-outform", "der", "-out", "ca.der");
            run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=other",
                    "-keyout", "other.key", "-out", "other.crt");
            run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", "server.key",
                    "-out", "server.csr");
            Files.writeString(folder.resolve("names"), "subjectAltName=DNS:localhost");
            run("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
                    "-CAcreateserial", "-days", "2",
                    "-extfile", "names", "-out", "server.crt");
            Path data = Path.of(Servers.sql("postgres", "SHOW data_directory").getFirst());
            for (String file : List.of("server.crt", "server.key")) {
                Files.deleteIfExists(data.resolve(file));
                Files.createFile(data.resolve(file), java.nio.file.attribute.PosixFilePermissions.asFileAttribute(
                        java.nio.file.attribute.PosixFilePermissions.fromString("rw-------")));
                Files.write(data.resolve(file), Files.readAllBytes(folder.resolve(file)));
            }
            Servers.sql("postgres", "ALTER SYSTEM SET ssl = on");
            Servers.sql("postgres", "SELECT pg_reload_conf()");
            Wait.until("it speaks TLS", () -> Servers.sql("postgres", "SHOW ssl").equals(List.of("on")));
        }

        private static void run(String... command) throws Exception {
            Process process = new ProcessBuilder(command).directory(folder.toFile()).redirectErrorStream(true).start();
            String said = new String(process.getInputStream().readAllBytes());
            assertEquals(0, process.waitFor(), said);
        }

        @ParameterizedTest @CsvSource({"require,localhost,", "verify-ca,127.0.0.1,ca.crt",
                "verify-full,localhost,ca.crt", "verify-full,localhost,ca.der"})
        void is_used_over_TLS(String mode, String host, String authority) throws Exception {
            String database = Servers.newDatabase();
            String file = authority == null ? "" : folder.resolve(authority).toString();
            try (Instance board = new Instance("tls-" + mode,
                    with(database, "DB_HOST", host, "DB_SSLMODE", mode, "DB_SSLROOTCERT", file))) {
                board.awaitReady();
                board.say("a", "secret").expect(201);
                assertEquals(List.of("0"), Servers.sql("postgres",
                        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
                        + "WHERE datname = '" + database + "' AND application_name LIKE 'threefold%' AND NOT ssl"));
            }
        }

        @ParameterizedTest @CsvSource({"verify-ca,localhost,other.crt", "verify-full,127.0.0.1,ca.crt"})
        void is_not_used_if_its_certificate_is_wrong(String mode, String host, String authority) throws Exception {
            try (Instance board = new Instance("wary", with(Servers.newDatabase(), "DB_HOST", host, "DB_SSLMODE", mode,
                    "DB_SSLROOTCERT", folder.resolve(authority).toString()))) {
                board.say("a", "not to a stranger").unavailable();
                Wait.until("it says why", () -> LogCapture.all().toString()
                        .matches("(?is).*(certificate|hostname|PKIX).*"));
            }
        }
    }

    /** PGBOUNCER names the program, if it is not /usr/sbin/pgbouncer; without one, this is skipped. */
    @Nested class Behind_PgBouncer {
        private static final String PROGRAM = System.getenv().getOrDefault("PGBOUNCER", "/usr/sbin/pgbouncer");

        @ParameterizedTest @ValueSource(strings = {"session", "transaction"})
        void all_works(String mode) throws Exception {
            Assumptions.assumeTrue(Files.isExecutable(Path.of(PROGRAM)), "there is no PgBouncer");
            Process asked = new ProcessBuilder(PROGRAM, "--version").start();
            String version = new String(asked.getInputStream().readAllBytes()).replaceAll("(?s)\\D*1\\.(\\d+).*", "$1");
            boolean prepares = Integer.parseInt(version) >= 21; // in transaction mode too
            Assumptions.assumeTrue(prepares || mode.equals("session"), "PgBouncer 1." + version
                    + " is older than 1.21");
            String database = Servers.newDatabase();
            int port = Servers.freePort();
            Process pooler = start(mode, port, prepares);
            try (Instance one = new Instance("pooled-1", with(database, "DB_PORT", "" + port));
                 Instance two = new Instance("pooled-2", with(database, "DB_PORT", "" + port))) {
                one.awaitReady();
                two.awaitReady();
                try (EventsTest.Subscriber viewer = new EventsTest.Subscriber(one, "")) {
                    List<Long> stored = new ArrayList<>();
                    for (int i = 0; i < 60; i++) stored.add((i % 2 == 0 ? one : two).say("a", "pooled " + i)
                            .expect(201).id());
                    assertEquals(stored.getFirst(), one.get("/api/messages/" + stored.getFirst()).expect(200).id());
                    two.get("/api/messages?limit=50&before=" + stored.getLast()).expect(200);
                    Wait.until("all is told", () -> viewer.ids().containsAll(stored));
                    viewer.checkInTurn();
                }
            } finally {
                pooler.destroy();
                pooler.waitFor();
            }
        }

        private static Process start(String mode, int port, boolean prepares) throws Exception {
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("pgbouncer-" + mode));
            Files.writeString(folder.resolve("users"), "\"postgres\" \"" + Servers.password() + "\"\n");
            Path settings = Files.writeString(folder.resolve("pgbouncer.ini"), """
                    [databases]
                    * = host=127.0.0.1 port=%d
                    [pgbouncer]
                    listen_addr = 127.0.0.1
                    listen_port = %d
                    unix_socket_dir =
                    auth_type = plain
                    auth_file = %s
                    pool_mode = %s
                    default_pool_size = %d
                    %s
                    """.formatted(Servers.databasePort(), port, folder.resolve("users"), mode,
                    mode.equals("session") ? 20 : 3, prepares ? "max_prepared_statements = 100" : ""));
            List<String> command = new ArrayList<>(List.of(PROGRAM, settings.toString()));
            if (System.getProperty("user.name").equals("root")) { // it does not run as root
                new ProcessBuilder("chmod", "-R", "a+rX", folder.toString(), Servers.FOLDER.toString()).start()
                        .waitFor();
                if (PROGRAM.startsWith("/usr")) command.addAll(1, List.of("-u", "nobody"));
            }
            return new ProcessBuilder(command).redirectErrorStream(true)
                    .redirectOutput(folder.resolve("out").toFile()).start();
        }
    }

    @Nested class A_Redis {
        private static Jedis in(int db) {
            Jedis jedis = Servers.jedis();
            jedis.select(db);
            jedis.flushDB();
            return jedis;
        }

        @Test void that_refuses_a_command_is_not_taken_for_away() throws Exception {
            try (Jedis jedis = in(3); Instance board = new Instance("refused",
                    with(Servers.newDatabase(), "REDIS_DB", "3"))) {
                board.awaitReady();
                jedis.lpush("visits:total", "no number");
                for (int i = 0; i < 20; i++) {
                    assertTrue(board.get("/").expect(200).json().get("visits").isJsonNull());
                    assertEquals("ready", board.get("/readyz").expect(200).text("status"));
                }
                jedis.del("visits:total");
                assertEquals(1, board.visits());
            }
        }

        @Test void that_became_a_replica_is_taken_for_away_until_it_is_none() throws Exception {
            Embedded own = new Embedded(ConfigurationTest.config("DATA_DIR", Servers.FOLDER.resolve("replica")
                    .toString(),
                    "DB_HOST", "none"));
            try {
                Config.RedisAddress redis = Config.from(own.start(Map.of("DB_HOST", "none"))).redis();
                int port = redis.hosts().getFirst().getPort();
                try (Jedis jedis = new Jedis("127.0.0.1", port); Instance board = new Instance("replica",
                        with(Servers.newDatabase(), "REDIS_PORT", "" + port, "REDIS_PASS", redis.pass().value()))) {
                    jedis.auth(redis.pass().value());
                    board.awaitReady();
                    jedis.replicaof("127.0.0.1", 1);
                    assertTrue(board.get("/").expect(200).json().get("visits").isJsonNull());
                    Wait.until("it is", Duration.ofSeconds(1),
                            () -> board.get("/readyz").text("status").equals("degraded"));
                    for (int i = 0; i < 40; i++) { // longer than several looks of its watcher
                        assertEquals("degraded", board.get("/readyz").expect(200).text("status"), "and stays so");
                        Thread.sleep(50);
                    }
                    jedis.replicaofNoOne();
                    Wait.until("it counts again", Wait.PROMISED, () -> !board.get("/").json().get("visits")
                            .isJsonNull());
                }
            } finally { own.close(); }
        }

        /** As managed servers, and proxies before them, do after a while. */
        @Test void that_closes_connections_is_not_taken_for_away() throws Exception {
            try (RedisProgram server = new RedisProgram("timeout 2"); Instance board = new Instance("idle", with(
                    Servers.newDatabase(), "REDIS_PORT", "" + server.port, "REDIS_PASS", ""))) {
                board.awaitReady();
                board.visits();
                board.total();
                Thread.sleep(3_500);
                assertEquals(2, board.visits(), "an idle connection is tested before a count");
                assertEquals(2, board.total());
                try (Jedis jedis = new Jedis("127.0.0.1", server.port)) {
                    jedis.sendCommand(redis.clients.jedis.Protocol.Command.CLIENT, "KILL", "TYPE", "normal");
                }
                for (int i = 0; i < 5; i++) {
                    board.get("/").expect(200);
                    board.get("/api/visits");
                    assertEquals("ready", OutageTest.status(board));
                }
                assertTrue(board.visits() > 2);
                assertFalse(LogCapture.all().toString().contains("store_unavailable"), "" + LogCapture.last(5));
            }
        }

        @Test void that_is_a_replica_is_not_read_either() throws Exception {
            try (RedisProgram replica = new RedisProgram("replicaof 127.0.0.1 1"); Instance board = new Instance(
                    "old-total", with(Servers.newDatabase(), "REDIS_PORT", "" + replica.port, "REDIS_PASS", ""))) {
                for (int i = 0; i < 10; i++) {
                    board.get("/api/visits").unavailable();
                    assertTrue(board.get("/").expect(200).json().get("visits").isJsonNull());
                    Thread.sleep(100);
                }
                try (Redis redis = new Redis(Config.from(with("none", "REDIS_PORT", "" + replica.port,
                        "REDIS_PASS", "")))) {
                    assertThrows(StoreException.class, new Counters(redis, "reader", new Metrics())::poll,
                            "each connection proves where it leads");
                }
            }
        }

        /** One that was cut off knows the primary of before; here the cut-off primary still answers as well. */
        @Test void is_where_most_Sentinels_have_it() throws Exception {
            try (RedisProgram now = new RedisProgram(); RedisProgram before = new RedisProgram();
                 RedisProgram stale = sentinel(before, 3);
                 RedisProgram one = sentinel(now, 4); RedisProgram other = sentinel(now, 4);
                 Jedis counts = new Jedis("127.0.0.1", now.port)) {
                counts.set("visits:total", "100");
                String sentinels = "127.0.0.1:" + stale.port + ",127.0.0.1:" + one.port + ",127.0.0.1:" + other.port;
                Map<String, String> environment = with(Servers.newDatabase(), "REDIS_SENTINELS", sentinels,
                        "REDIS_HOST", "", "REDIS_PASS", "");
                try (Instance board = new Instance("elected", environment)) {
                    board.awaitReady();
                    assertEquals(101, board.visits());
                    assertEquals(101, board.total());
                }
                one.kill();
                try (Instance board = new Instance("undecided", environment)) {
                    Wait.until("it finds no majority", () -> LogCapture.all().toString().contains("do not agree"));
                    assertTrue(board.get("/").expect(200).json().get("visits").isJsonNull());
                }
                try (Jedis old = new Jedis("127.0.0.1", before.port)) { assertFalse(old.exists("visits:total")); }
            }
        }

        /** Without a replica that has the count, a new primary might give its number again. */
        @Test void that_has_to_reach_a_replica_gives_no_number_without_one() throws Exception {
            try (RedisProgram primary = new RedisProgram(); Instance board = new Instance("replicated", with(
                    Servers.newDatabase(), "REDIS_PORT", "" + primary.port, "REDIS_PASS", "",
                    "REDIS_WAIT_REPLICAS", "1"))) {
                board.awaitReady();
                assertTrue(board.get("/").expect(200).json().get("visits").isJsonNull());
                assertEquals("ready", OutageTest.status(board));
                try (RedisProgram replica = new RedisProgram("replicaof 127.0.0.1 " + primary.port)) {
                    Wait.until("the replica confirms a count",
                            () -> !board.get("/").expect(200).json().get("visits").isJsonNull());
                    long visit = board.visits();
                    assertEquals(visit + 1, board.visits());
                }
            }
        }

        private static RedisProgram sentinel(RedisProgram primary, int epoch) throws Exception {
            return new RedisProgram("sentinel monitor threefold 127.0.0.1 " + primary.port + " 2",
                    "sentinel config-epoch threefold " + epoch, "sentinel down-after-milliseconds threefold 60000");
        }

        @Test void is_used_by_a_user_with_few_rights() throws Exception {
            try (Jedis jedis = in(4); Instance board = board(jedis,
                    "~visits:* ~{visits:total}:* &threefold:* +@all -@admin")) {
                board.awaitReady();
                assertEquals(1, board.visits());
                assertEquals(1, board.total());
            }
        }

        private Instance board(Jedis jedis, String rights) {
            jedis.aclSetUser("guest", ("reset resetchannels on >pass " + rights).split(" "));
            return new Instance("guest", with(Servers.newDatabase(), "REDIS_USER", "guest", "REDIS_PASS", "pass",
                    "REDIS_DB", "4"));
        }

        /** A Redis Cluster refuses commands whose keys are not all in one slot. */
        @Test void that_is_a_cluster_counts() throws Exception {
            try (RedisProgram server = new RedisProgram("cluster-enabled yes", "save \"\"");
                 Jedis jedis = new Jedis("127.0.0.1", server.port)) {
                jedis.clusterAddSlots(java.util.stream.IntStream.range(0, 16384).toArray());
                Wait.until("all slots are served", () -> jedis.clusterInfo().contains("cluster_state:ok"));
                try (Instance board = new Instance("slots", with(Servers.newDatabase(), "REDIS_PORT", "" + server.port,
                        "REDIS_PASS", ""))) {
                    board.awaitReady();
                    assertEquals(1, board.visits());
                    assertEquals(1, board.total());
                    Wait.until("it is seen", () -> board.get("/api/instances").body().contains("\"ready\""));
                }
            }
        }

        /** Names of containers come and go; what they counted stays in the total. */
        @Test void keeps_what_instances_counted_that_are_long_gone_as_one_number() throws Exception {
            try (Jedis jedis = in(7)) {
                jedis.set("visits:total", "20");
                jedis.hset("{visits:total}:by-instance", Map.of("gone1", "7", "gone2", "8", "here", "5"));
                Config config = Config.from(with(Servers.newDatabase(), "REDIS_DB", "7", "INSTANCE_ID", "settled"));
                try (Redis redis = new Redis(config)) {
                    Counters counters = new Counters(redis, "settled", new Metrics());
                    counters.compact(Set.of()); // it cannot know yet which instances live
                    assertEquals(3, counters.poll().byInstance().size());
                    counters.compact(Set.of("here", "settled"));
                    assertEquals(Map.of("earlier instances", 15L, "here", 5L), counters.poll().byInstance());
                    assertEquals(20, counters.poll().total());
                }
            }
        }

        @Test void on_which_others_say_odd_things_goes_on_waking() throws Exception {
            try (Jedis jedis = Servers.jedis(); Instance board = new Instance("calm",
                    Servers.environment(Servers.newDatabase()));
                 EventsTest.Subscriber viewer = new EventsTest.Subscriber(board, "")) {
                board.awaitReady();
                for (String word : List.of("", "\n", "visits", "visits\n", "messages\nx y", "messages\n1", "missed",
                        "\u0000\uffff", "{}", "[]", "1",
                        "{\"instance\":[]}",
                        "{\"instance\":\"<b>\",\"state\":\"ready\",\"since\":\"\",\"version\":\"\"}",
                        "{\"instance\":\"a\",\"state\":\"" + "x".repeat(2_000) + "\"}"))
                    for (String channel : List.of("threefold:events", "threefold:instances:0"))
                        jedis.publish(channel, word);
                viewer.awaits(board.say("a", "still told").expect(201));
                long visit = board.visits();
                Wait.until("the visit is told", () -> viewer.lastVisits() >= visit);
                assertFalse(board.get("/api/instances").body().contains("<b>"));
                assertFalse(LogCapture.all().toString().contains("internal_error"), "" + LogCapture.last(5));
            }
        }

        @Test void with_an_odd_counter_ends_no_thread() throws Exception {
            try (Jedis jedis = in(6); Instance board = new Instance("odd",
                    with(Servers.newDatabase(), "REDIS_DB", "6"));
                 EventsTest.Subscriber viewer = new EventsTest.Subscriber(board, "")) {
                board.awaitReady();
                jedis.set("visits:by-instance", "no hash");
                jedis.hset("{visits:total}:by-instance", "odd", "many");
                board.get("/api/visits").unavailable();
                board.get("/", "Accept", "text/html").expect(200);
                Thread.sleep(11_000); // it tidies up each ten seconds; what it can't is no sign that Redis is away
                assertEquals("ready", board.get("/readyz").expect(200).text("status"));
                assertTrue(board.get("/").expect(200).json().get("visits").isJsonNull());
                board.get("/api/visits");
                Thread.sleep(700);
                jedis.flushDB();
                long visit = board.visits();
                Wait.until("the visit is told", () -> viewer.lastVisits() == visit);
            }
        }

        /** A Redis behind TLS, as managed ones are; whom to trust is Java's own setting. */
        @ParameterizedTest @CsvSource({"localhost,true", "127.0.0.1,false"})
        void with_TLS_is_used_if_its_certificate_is_for_its_name(String host, boolean good) throws Exception {
            A_PostgreSQL_with_TLS.certificates();
            Path folder = Servers.FOLDER.resolve("tls");
            Path trust = folder.resolve("trust.p12"), own = folder.resolve("own.p12");
            A_PostgreSQL_with_TLS.run("openssl", "pkcs12", "-export", "-in", "server.crt", "-inkey", "server.key",
                    "-out", own.toString(), "-passout", "pass:secret");
            Files.deleteIfExists(trust);
            A_PostgreSQL_with_TLS.run(System.getProperty("java.home") + "/bin/keytool", "-importcert", "-noprompt",
                    "-alias", "ca", "-file", "ca.crt", "-keystore", trust.toString(), "-storepass", "secret");
            try (TlsFront front = new TlsFront(own, Servers.redisPort()); Program board = Program.java(with(
                    Servers.newDatabase(), "REDIS_HOST", host, "REDIS_PORT", "" + front.port(), "REDIS_TLS", "true",
                    "JAVA_TOOL_OPTIONS", "-Djavax.net.ssl.trustStore=" + trust
                            + " -Djavax.net.ssl.trustStorePassword=secret"))) {
                Wait.until("it serves", Duration.ofSeconds(20), () -> board.get("/readyz").status() == 200);
                if (good) board.awaitReady();
                assertEquals(good, !board.get("/").expect(200).json().get("visits").isJsonNull());
            }
        }
    }

    /** A Redis, or a Sentinel, as a program with these lines in its configuration. */
    private static final class RedisProgram implements AutoCloseable {
        final int port = Servers.freePort();
        private final Process process;

        RedisProgram(String... lines) throws Exception {
            Path folder = Files.createDirectories(Servers.FOLDER.resolve("redis-" + port));
            Path settings = Files.write(folder.resolve("redis.conf"), Stream.concat(
                    Stream.of("port " + port, "dir " + folder), Stream.of(lines)).toList());
            List<String> command = new ArrayList<>(List.of(Servers.redisProgram().toString(), settings.toString()));
            if (String.join("", lines).startsWith("sentinel")) command.add("--sentinel");
            process = new ProcessBuilder(command).redirectErrorStream(true)
                    .redirectOutput(folder.resolve("out").toFile()).start();
            Wait.until("Redis answers at " + port, () -> {
                try (Jedis jedis = new Jedis("127.0.0.1", port)) { return jedis.ping().equals("PONG"); }
            });
        }

        void kill() { process.destroyForcibly().onExit().join(); }

        @Override public void close() { kill(); }
    }

    /** A standby of the server that all tests share: a copy of its folder that follows nobody. */
    private static final class Standby implements AutoCloseable {
        final int port = Servers.freePort();
        private final List<String> pgCtl;
        private final Path folder;

        Standby(Path folder) throws Exception {
            this.folder = folder;
            Servers.databasePort(); // unpacks the programs
            Path programs = programs();
            boolean root = ProcessHandle.current().info().user().orElse("").equals("root");
            pgCtl = root ? List.of("unshare", "-U", programs.resolve("pg_ctl").toString())
                    : List.of(programs.resolve("pg_ctl").toString());
            try (Connection primary = Servers.connect("postgres"); var work = primary.createStatement()) {
                Path from;
                try (var row = work.executeQuery("SHOW data_directory")) {
                    row.next();
                    from = Path.of(row.getString(1));
                }
                work.execute("SELECT pg_backup_start('copy', true)"); // the manual, 25.3.3: a copy of the folder
                copy(from, folder);
                try (var row = work.executeQuery("SELECT labelfile FROM pg_backup_stop(false)")) {
                    row.next();
                    Files.writeString(folder.resolve("backup_label"), row.getString(1));
                }
                copy(from.resolve("pg_wal"), folder); // with the end of the backup
            }
            Files.deleteIfExists(folder.resolve("postmaster.pid"));
            Files.write(folder.resolve("standby.signal"), new byte[0]);
            run("start", "-w", "-l", folder.resolve("log").toString(), "-o", "-p " + port
                    + " -c max_connections=300 -c unix_socket_directories='' -c listen_addresses=127.0.0.1");
        }

        private static void copy(Path from, Path to) throws IOException, InterruptedException {
            new ProcessBuilder("cp", "-a", from.toString(), to.toString()).start().waitFor();
        }

        private static Path programs() throws IOException {
            try (Stream<Path> files = Files.walk(Servers.FOLDER.resolve("shared/postgres-bin"))) {
                return files.filter(file -> file.getFileName().toString().equals("pg_ctl")).findFirst().orElseThrow()
                        .getParent();
            }
        }

        private void run(String... arguments) throws IOException, InterruptedException {
            List<String> command = new ArrayList<>(pgCtl);
            command.addAll(List.of("-D", folder.toString()));
            command.addAll(List.of(arguments));
            Process process = new ProcessBuilder(command).redirectErrorStream(true)
                    .redirectOutput(folder.resolve("pg_ctl").toFile()).start();
            if (process.waitFor() != 0) throw new IOException(Files.readString(folder.resolve("pg_ctl"))
                    + (Files.exists(folder.resolve("log")) ? Files.readString(folder.resolve("log")) : ""));
        }

        @Override public void close() throws IOException {
            try {
                run("stop", "-m", "immediate");
            } catch (InterruptedException e) { Thread.currentThread().interrupt(); }
        }
    }

    /** Takes TLS and passes on what is in it. */
    private static final class TlsFront implements AutoCloseable {
        private final ServerSocket entry;

        TlsFront(Path keys, int target) throws Exception {
            KeyStore store = KeyStore.getInstance(keys.toFile(), "secret".toCharArray());
            KeyManagerFactory managers = KeyManagerFactory.getInstance(KeyManagerFactory.getDefaultAlgorithm());
            managers.init(store, "secret".toCharArray());
            SSLContext context = SSLContext.getInstance("TLS");
            context.init(managers.getKeyManagers(), null, null);
            entry = context.getServerSocketFactory().createServerSocket(0);
            Thread.ofVirtual().start(() -> {
                while (!entry.isClosed())
                    try {
                        Socket here = entry.accept(), there = new Socket("127.0.0.1", target);
                        Thread.ofVirtual().start(() -> pass(here, there));
                        Thread.ofVirtual().start(() -> pass(there, here));
                    } catch (IOException e) { /* it is closed, or somebody went away */ }
            });
        }

        int port() { return entry.getLocalPort(); }

        private static void pass(Socket from, Socket to) {
            try (from; to) {
                from.getInputStream().transferTo(to.getOutputStream());
            } catch (IOException e) { /* it ended */ }
        }

        @Override public void close() throws IOException { entry.close(); }
    }
}
