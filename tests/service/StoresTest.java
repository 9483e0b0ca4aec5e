import com.google.gson.JsonParser;
import org.junit.jupiter.api.*;
import org.junit.jupiter.api.extension.ExtendWith;
import org.junit.jupiter.params.ParameterizedTest;
import org.junit.jupiter.params.provider.CsvSource;
import org.junit.jupiter.params.provider.ValueSource;
import redis.clients.jedis.Jedis;

import java.io.IOException;
import java.net.ConnectException;
import java.net.ServerSocket;
import java.net.Socket;
import java.nio.file.Files;
import java.nio.file.Path;
import java.security.KeyStore;
import java.sql.*;
import java.time.Duration;
import java.util.*;
import java.util.concurrent.Callable;
import java.util.stream.Collectors;
import java.util.stream.Stream;
import javax.net.ssl.KeyManagerFactory;
import javax.net.ssl.SSLContext;

import static org.junit.jupiter.api.Assertions.*;

/** Stores that reject, are slow or read-only, want TLS, were restored from a dump, or are behind a pooler. */
@ExtendWith(LogCapture.class)
class StoresTest {
    private static void endSessions(String database) {
        Servers.sql("postgres", "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '" + database
                + "'");
    }

    private static void awaitLog(String words) {
        Wait.until("the log has " + words, () -> LogCapture.all().toString().matches("(?is).*(" + words + ").*"));
    }

    /** A PostgreSQL of a test's own, whose settings it may change. */
    private static final class OwnPostgres implements AutoCloseable {
        final String[] address;
        private final Embedded embedded;
        private final Connection admin;

        OwnPostgres(String folder) throws Exception {
            embedded = new Embedded(ConfigurationTest.config("DATA_DIR", Servers.FOLDER.resolve(folder).toString(),
                    "REDIS_HOST", "none"));
            Map<String, String> to = embedded.start(Map.of("REDIS_HOST", "none"));
            address = new String[] {"DB_PORT", to.get("DB_PORT"), "DB_PASS", to.get("DB_PASS")};
            admin = connect();
        }

        Connection connect() throws SQLException {
            return DriverManager.getConnection("jdbc:postgresql://127.0.0.1:" + address[1] + "/postgres", "postgres",
                    address[3]);
        }

        /** The value of the first row, or null. */
        String sql(String statement) throws SQLException {
            try (var work = admin.createStatement()) {
                if (!work.execute(statement)) return null;
                ResultSet row = work.getResultSet();
                return row.next() ? row.getString(1) : null;
            }
        }

        /** From now on each commit waits for a standby that does not exist; or no longer. */
        void waitForStandby(boolean on) throws SQLException {
            sql("ALTER SYSTEM SET synchronous_standby_names = '" + (on ? "none" : "") + "'");
            sql("SELECT pg_reload_conf()");
        }

        @Override public void close() { embedded.close(); }
    }

    @Nested class A_PostgreSQL {
        @Test void without_the_right_to_create_tables_is_used_once_it_is_granted() {
            String database = Servers.newDatabase();
            Servers.sql(database, "CREATE ROLE poor LOGIN PASSWORD 'poor'; REVOKE CREATE ON SCHEMA public FROM public");
            try (Instance board = new Instance("poor", database, "DB_USER", "poor", "DB_PASS", "poor")) {
                board.save("a", "no table").unavailable();
                assertEquals("starting", board.get("/readyz").expect(503).text("status"));
                board.sql("GRANT CREATE ON SCHEMA public TO poor");
                Wait.until("it creates its table", Wait.PROMISED, () -> board.get("/readyz").status() == 200);
                Wait.until("it stores", Wait.PROMISED, () -> board.save("a", "a table").status() == 201);
            }
        }

        @Test void that_became_read_only_is_replaced_by_one_that_is_not() {
            try (Instance board = new Instance("demoted")) {
                board.save("a", "before").expect(201);
                String alter = "ALTER DATABASE " + board.database;
                Servers.sql("postgres", alter + " SET default_transaction_read_only = on");
                endSessions(board.database);
                Wait.until("it is read-only", () -> board.save("a", "lost").status() == 503);
                Servers.sql("postgres", alter + " RESET default_transaction_read_only");
                Wait.until("it stores on a new connection", Wait.PROMISED,
                        () -> board.save("a", "after").status() == 201);
            }
        }

        @Test void that_waits_for_a_standby_keeps_no_session_for_each_try() throws Exception {
            try (OwnPostgres own = new OwnPostgres("standby");
                 Instance board = new Instance("standby", "postgres", own.address)) {
                board.save("a", "alone").expect(201);
                own.waitForStandby(true);
                Wait.until("it waits for one", () -> board.save("a", "not safe").status() == 503);
                for (int i = 0; i < 4; i++) {
                    board.save("a", "not safe either " + i).unavailable();
                    board.get("/api/messages").expect(200);
                }
                String waiting = own.sql("SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'SyncRep'");
                assertTrue(Integer.parseInt(waiting) <= 1, "expected at most one session that waits, saw " + waiting);
                blocksItsSuccessorAfterASecond(own);
                own.waitForStandby(false);
                Wait.until("it stores again", Wait.PROMISED, () -> board.save("a", "safe").status() == 201);
            }
        }

        /** An instance that is replaced has the same name, and each of its commits waits for a moment. */
        private static void blocksItsSuccessorAfterASecond(OwnPostgres own) throws Exception {
            Config config = Config.from(Servers.environment("postgres",
                    Caller.and(own.address, "INSTANCE_ID", "replaced")));
            Connection other = own.connect();
            other.createStatement().execute("SET application_name = 'threefold replaced'");
            var waits = Wait.meanwhile(() -> other.createStatement().execute("CREATE TABLE waits ()"));
            Thread.sleep(300);
            try (Postgres postgres = new Postgres(config)) {
                var writes = postgres.session(Messages::requireNoStuckCommit);
                assertEquals("in", writes.probe(connection -> "in"), "a commit of this moment blocks no other");
            }
            Thread.sleep(1_000);
            try (Postgres postgres = new Postgres(config)) {
                var writes = postgres.session(Messages::requireNoStuckCommit);
                assertThrows(SQLException.class, () -> writes.probe(connection -> true));
            }
            assertFalse(waits.isDone(), "it waits");
        }

        @Test void that_ends_all_sessions_fails_no_request() {
            try (Instance board = new Instance("ended")) {
                board.save("a", "before").expect(201);
                for (int i = 0; i < 3; i++) {
                    endSessions(board.database);
                    board.save("a", "on a new connection").expect(201);
                    endSessions(board.database);
                    board.get("/api/messages").expect(200);
                }
            }
        }

        @Test void whose_table_was_dropped_gets_it_again() {
            try (Instance board = new Instance("dropped")) {
                board.save("a", "before").expect(201);
                board.sql("DROP TABLE messages");
                Wait.until("it stores again", Wait.PROMISED, () -> board.save("a", "after").status() == 201);
                assertEquals(1, MessagesTest.stored(board, "").size());
            }
        }

        @Test void that_sends_notices_and_warnings_has_stored_the_message() {
            try (Instance board = new Instance("remarks")) {
                board.awaitReady();
                board.sql("CREATE FUNCTION remark() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN "
                        + "RAISE NOTICE ''seen''; RAISE WARNING ''must be vacuumed''; RETURN NEW; END'; CREATE TRIGGER "
                        + "remark BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION remark()");
                board.save("a", "stored").expect(201);
                board.save("a", "with a key", "Idempotency-Key", "k").expect(201);
                board.save("a", "with a key", "Idempotency-Key", "k").expect(200);
                assertEquals("ready", board.status());
            }
        }

        private static void rejects(Instance board, String statements) {
            board.awaitReady();
            board.sql("CREATE FUNCTION judge() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN " + statements + " END'; "
                    + "CREATE TRIGGER judge BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION judge()");
        }

        @Test void that_rejects_a_message_rejects_no_other_one() throws Exception {
            try (Instance board = new Instance("policy")) {
                rejects(board, "IF NEW.author = ''bad'' THEN RAISE EXCEPTION ''no''; END IF; "
                        + "IF NEW.author = ''odd'' THEN RETURN NULL; END IF; RETURN NEW;");
                List<Callable<Answer>> posts = new ArrayList<>();
                for (int i = 0; i < 400; i++) {
                    String author = i % 50 == 7 ? "bad" : i % 50 == 9 ? "odd" : "good", body = "" + i;
                    posts.add(() -> board.save(author, body));
                }
                Map<String, Long> answers = Wait.together(posts).stream().collect(
                        Collectors.groupingBy(answer -> "" + answer.status(), Collectors.counting()));
                assertEquals(Map.of("201", 384L, "503", 16L), answers);
                assertEquals("ready", board.status());
            }
        }

        @Test void that_rejects_all_messages_slowly_is_given_up_in_time() throws Exception {
            try (Instance board = new Instance("strict")) {
                rejects(board, "PERFORM pg_sleep(0.03); RAISE EXCEPTION ''no'';");
                Callable<Answer> post = () -> OutageTest.inTime(() -> board.save("a", "b"));
                for (Answer answer : Wait.together(Collections.nCopies(100, post))) answer.unavailable();
            }
        }

        /** One connection that hangs, as behind a firewall that lost its state, is no server that hangs. */
        @Test void one_of_whose_connections_hangs_keeps_the_others() throws Exception {
            try (Instance board = new Instance("stuck")) {
                board.awaitReady();
                board.save("a", "b").expect(201);
                board.get("/api/messages").expect(200);
                String ours = "SELECT pid FROM pg_stat_activity WHERE application_name = 'threefold stuck' AND query ";
                String writes = board.sql(ours + "LIKE '%INSERT INTO messages%'").getFirst();
                List<String> others = board.sql(ours + "NOT LIKE '%INSERT INTO messages%' ORDER BY pid");
                kill("STOP", writes);
                try {
                    var stuck = Wait.meanwhile(() -> board.save("a", "never arrives"));
                    while (!stuck.isDone()) {
                        board.get("/api/messages").expect(200);
                        Thread.sleep(10);
                    }
                    stuck.get().unavailable();
                    for (int i = 0; i < 50; i++) {
                        board.get("/api/messages").expect(200);
                        Thread.sleep(10);
                    }
                    board.save("a", "on a new connection").expect(201);
                    assertEquals(others, board.sql(ours + "NOT LIKE '%INSERT INTO messages%' ORDER BY pid"),
                            "the others stay open");
                } finally { kill("CONT", writes); }
            }
        }

        private static void kill(String signal, String pid) throws Exception {
            new ProcessBuilder("kill", "-" + signal, pid).start().waitFor();
        }

        @Test void whose_commit_was_cancelled_before_a_standby_had_it_has_not_stored_it() throws Exception {
            try (OwnPostgres own = new OwnPostgres("let-go");
                 Instance board = new Instance("let-go", "postgres", own.address)) {
                board.save("a", "alone").expect(201);
                own.sql("ALTER DATABASE postgres SET client_min_messages = error");
                own.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        + "WHERE application_name LIKE 'threefold%'");
                // The warning of a trigger comes before the one that matters.
                own.sql("CREATE FUNCTION remark() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RAISE WARNING ''first''; "
                        + "RETURN NEW; END'; CREATE TRIGGER remark BEFORE INSERT ON messages FOR EACH ROW "
                        + "EXECUTE FUNCTION remark()");
                own.waitForStandby(true);
                Wait.until("a commit that waits is cancelled and answered with 503", () -> {
                    var answer = Wait.meanwhile(() -> board.save("a", "on one server only"));
                    boolean cancelled = false;
                    while (!answer.isDone())
                        cancelled |= own.sql("SELECT pg_cancel_backend(pid) FROM pg_stat_activity "
                                + "WHERE wait_event = 'SyncRep'") != null;
                    assertEquals(503, answer.get().status(), "" + answer.get());
                    return cancelled;
                });
                own.waitForStandby(false);
            }
        }

        @Test void with_a_read_only_role_is_up() throws Exception {
            try (FaultProxy proxy = new FaultProxy(Servers.databasePort()); Instance owner = new Instance("owner")) {
                owner.save("a", "to be read").expect(201);
                owner.sql("CREATE ROLE reader LOGIN PASSWORD 'reader'; "
                        + "ALTER ROLE reader SET default_transaction_read_only = on; GRANT ALL ON messages TO reader");
                try (Instance board = new Instance("reader", owner.database, "DB_USER", "reader", "DB_PASS", "reader",
                        "DB_PORT", "" + proxy.port());
                     EventsTest.Subscriber subscriber = new EventsTest.Subscriber(board, "")) {
                    board.awaitReady();
                    for (int i = 0; i < 60; i++) {
                        board.save("a", "may not be written").unavailable();
                        assertEquals("ready", board.status(), "after POST " + i);
                        board.get("/api/messages").expect(200);
                    }
                    subscriber.awaits(owner.save("a", "still sent").expect(201));
                    assertFalse(LogCapture.all().toString().contains("store_unavailable"), "" + LogCapture.last(5));
                }
            }
        }

        @Test void whose_password_has_changed_keeps_open_connections() {
            String database = Servers.newDatabase();
            Servers.sql(database, "CREATE ROLE changing LOGIN PASSWORD 'changing'; "
                    + "GRANT ALL ON SCHEMA public TO changing");
            try (Instance board = new Instance("changing", database, "DB_USER", "changing", "DB_PASS", "changing")) {
                board.awaitReady();
                board.save("a", "before").expect(201);
                board.get("/api/messages").expect(200);
                board.sql("ALTER ROLE changing PASSWORD 'another'");
                board.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        + "WHERE usename = 'changing' AND query LIKE '%INSERT INTO messages%'");
                for (int i = 0; i < 20; i++) {
                    board.save("a", "not let in").unavailable();
                    board.get("/api/messages").expect(200);
                    assertEquals("ready", board.status());
                }
                board.sql("ALTER ROLE changing PASSWORD 'changing'");
                Wait.until("it is let in again", Wait.PROMISED, () -> board.save("a", "after").status() == 201);
            }
        }

        /** Where a retry meets the first try, a stricter isolation fails one of the two. */
        @Test void whose_default_is_a_stricter_isolation_stores_each_key_once() throws Exception {
            String database = Servers.newDatabase();
            Servers.sql("postgres", "ALTER DATABASE " + database
                    + " SET default_transaction_isolation = 'serializable'");
            try (Instance one = new Instance("strict1", database); Instance other = new Instance("strict2", database)) {
                one.awaitReady();
                other.awaitReady();
                for (int round = 0; round < 20; round++) {
                    List<Callable<Answer>> tries = new ArrayList<>();
                    for (int i = 0; i < 8; i++) {
                        Instance board = i % 2 == 0 ? one : other;
                        String key = "k" + round;
                        tries.add(() -> board.save("a", "once", "Idempotency-Key", key));
                    }
                    for (Answer answer : Wait.together(tries))
                        assertTrue(answer.status() == 200 || answer.status() == 201, "" + answer);
                }
                assertEquals(List.of("20"), one.sql("SELECT count(*) FROM messages"));
            }
        }

        @Test void with_such_a_table_of_another_program_is_not_changed() {
            String database = Servers.newDatabase();
            Servers.sql(database, "CREATE TABLE messages (id bigint PRIMARY KEY, subject text)");
            try (Instance board = new Instance("guest", database)) {
                board.save("a", "b").unavailable();
                awaitLog("another program's");
                assertEquals("starting", board.get("/readyz").expect(503).text("status"));
                assertEquals(List.of("2"), board.sql(
                        "SELECT count(*) FROM pg_attribute WHERE attrelid = 'messages'::regclass AND attnum > 0"));
            }
        }

        /** The driver sends Java's name of the time zone, and a server rejects one that it does not know. */
        @Test void gets_no_time_zone_that_it_may_not_know() throws Exception {
            String database = Servers.newDatabase();
            try (Program board = Program.java(Servers.environment(database, "TZ", "Asia/Calcutta"))) {
                Wait.until("it serves", Duration.ofSeconds(20), () -> board.get("/readyz").status() == 200);
                notes(database, "TimeZone");
                board.save("a", "b").expect(201);
                assertEquals(List.of("UTC"), Servers.sql(database, "SELECT setting FROM seen"));
            }
        }

        @Test void that_is_a_standby_is_not_used() throws Exception {
            Path copy = Servers.FOLDER.resolve("copy");
            try (Standby standby = new Standby(copy);
                 Instance board = new Instance("stale", "postgres", "DB_PORT", "" + standby.port)) {
                board.get("/api/messages").unavailable();
                assertEquals("starting", board.get("/readyz").expect(503).text("status"));
                awaitLog("it is a standby");
            }
        }

        @Test void of_another_encoding_is_not_used() {
            Servers.sql("postgres", "CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0 LOCALE 'C'");
            try (Instance board = new Instance("latin", "latin")) {
                board.save("a", "no room for an emoji").unavailable();
                awaitLog("LATIN1[^\n]*needs UTF8");
            }
        }

        @Test void in_the_middle_of_a_long_statement_is_closed_at_once() throws Exception {
            Postgres postgres = new Postgres(Config.from(Servers.environment(Servers.newDatabase())));
            var session = postgres.session();
            var statement = Wait.meanwhile(() -> session.probe(connection -> {
                connection.setNetworkTimeout(Runnable::run, 60_000);
                return connection.createStatement().execute("SET statement_timeout = 0; SELECT pg_sleep(20)");
            }));
            Thread.sleep(500);
            long began = System.nanoTime();
            postgres.close();
            assertThrows(Exception.class, statement::get);
            assertTrue(System.nanoTime() - began < 5_000_000_000L, "it waited for the statement");
        }

        @Test void that_rejects_the_password_gets_one_try_a_second() throws Exception {
            try (FaultProxy proxy = new FaultProxy(Servers.databasePort()); Instance board = new Instance("guessing",
                    Servers.newDatabase(), "DB_PORT", "" + proxy.port(), "DB_PASS", "wrong")) {
                board.save("a", "not let in").unavailable();
                Wait.until("a connection", () -> proxy.accepted() > 0);
                int before = proxy.accepted();
                Thread.sleep(3_000);
                int tries = proxy.accepted() - before;
                assertTrue(tries <= 4, "expected one try a second, actual: " + tries + " in three");
            }
        }

        @Test void that_is_back_is_tried_at_once() throws Exception {
            try (FaultProxy proxy = new FaultProxy(Servers.databasePort()); Postgres postgres = new Postgres(
                    Config.from(Servers.environment("postgres", "DB_PORT", "" + proxy.port())))) {
                var session = postgres.session();
                proxy.cut();
                Wait.until("it refuses connections", () -> {
                    try {
                        new Socket("127.0.0.1", proxy.port()).close();
                        return false;
                    } catch (ConnectException refused) { return true; }
                });
                assertThrows(SQLException.class, () -> session.probe(connection -> true));
                proxy.mend();
                assertEquals("in", session.probe(connection -> "in"));
            }
        }

        @Test void that_is_slow_to_write_delays_no_reader() throws Exception {
            try (Instance board = new Instance("slow-disk")) {
                board.save("a", "quick").expect(201);
                board.sql("CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS "
                        + "'BEGIN PERFORM pg_sleep(5); RETURN NEW; END'; "
                        + "CREATE TRIGGER dawdle BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION dawdle()");
                for (int i = 0; i < 3; i++) {
                    var slow = Wait.meanwhile(() -> board.save("a", "slow"));
                    while (!slow.isDone()) {
                        board.get("/api/messages").expect(200);
                        board.get("/readyz").expect(200);
                        Thread.sleep(20);
                    }
                    slow.get().unavailable();
                }
            }
        }

        /** From now on the database writes this setting into its table `seen` when it commits a message. */
        private static void notes(String database, String setting) {
            Servers.sql(database, "CREATE TABLE seen (setting text); CREATE FUNCTION look() RETURNS trigger "
                    + "LANGUAGE plpgsql AS 'BEGIN INSERT INTO seen VALUES (current_setting(''" + setting + "'')); "
                    + "RETURN NEW; END'; CREATE CONSTRAINT TRIGGER look AFTER INSERT ON messages DEFERRABLE "
                    + "INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION look()");
        }

        @Test void whose_default_is_not_to_wait_for_the_disk_waits_for_it() {
            String database = Servers.newDatabase();
            Servers.sql("postgres", "ALTER DATABASE " + database + " SET synchronous_commit = off");
            try (Instance board = new Instance("careful", database)) {
                board.awaitReady();
                notes(database, "synchronous_commit");
                board.save("a", "is it safe?").expect(201);
                assertEquals(List.of("on"), board.sql("SELECT setting FROM seen"));
            }
        }

        /** The numbers of transactions begin anew where a dump is restored: those in the rows are in the future. */
        @Test void that_was_restored_from_a_dump_sends_its_messages() throws Exception {
            String database = Servers.newDatabase();
            // The trigger makes the change longer than any statement of a request may take, as many rows do.
            Servers.sql(database, Files.readString(Program.root().resolve("init.sql"))
                    + "; INSERT INTO messages (author, body, instance, request_key, tx) "
                    + "VALUES ('a', 'b', 'c', 'd', '99999999999'); CREATE FUNCTION slow() RETURNS trigger "
                    + "LANGUAGE plpgsql AS $$ BEGIN PERFORM pg_sleep(1.5); RETURN NEW; END $$; CREATE TRIGGER slow "
                    + "BEFORE UPDATE ON messages FOR EACH ROW WHEN (OLD.tx IS DISTINCT FROM NEW.tx) "
                    + "EXECUTE FUNCTION slow()");
            try (Instance board = new Instance("restored", database);
                 EventsTest.Subscriber subscriber = new EventsTest.Subscriber(board, "?after=0")) {
                Wait.until("it is sent", () -> subscriber.ids().size() == 1);
                subscriber.awaits(board.save("a", "and new ones as well").expect(201));
                subscriber.checkOrder();
            }
        }

        @Test void whose_schema_takes_long_to_create_keeps_no_request_waiting() throws Exception {
            String database = Servers.newDatabase();
            Servers.sql(database, "CREATE FUNCTION slow() RETURNS event_trigger LANGUAGE plpgsql AS "
                    + "$$ BEGIN PERFORM pg_sleep(5); END $$; CREATE EVENT TRIGGER slow ON ddl_command_start "
                    + "WHEN TAG IN ('CREATE INDEX') EXECUTE FUNCTION slow()");
            long began = System.nanoTime();
            try (Postgres postgres = new Postgres(Config.from(Servers.environment(database)));
                 Messages messages = new Messages(postgres, "reader", new Metrics())) {
                assertThrows(StoreException.class, () -> messages.pages(List.of(PageQuery.NEWEST)));
            }
            assertTrue(System.nanoTime() - began < 2_500_000_000L, "a reader creates no schema");
            try (Instance board = new Instance("changing", database)) {
                List<Callable<Boolean>> requests = new ArrayList<>();
                for (int i = 0; i < 10; i++) {
                    requests.add(() -> quick(() -> board.get("/api/messages")));
                    requests.add(() -> quick(() -> board.save("a", "b")));
                }
                assertTrue(Wait.together(requests).stream().allMatch(is -> is), "within 2.5 s: 200, 201 or 503");
                board.awaitReady();
                board.save("a", "b").expect(201);
            }
        }

        private static boolean quick(Callable<Answer> request) throws Exception {
            long began = System.nanoTime();
            boolean fair = Set.of(200, 201, 503).contains(request.call().status());
            return fair && System.nanoTime() - began < 2_500_000_000L;
        }

        @Test void on_one_of_several_hosts_is_found() throws Exception {
            String hosts = "127.0.0.1:" + Servers.freePort() + ",127.0.0.1:" + Servers.databasePort();
            try (Instance board = new Instance("several", Servers.newDatabase(), "DB_HOST", hosts)) {
                board.awaitReady();
                board.save("a", "found").expect(201);
            }
        }
    }

    @Nested class A_PostgreSQL_with_TLS {
        private static final Path folder = Servers.FOLDER.resolve("tls");

        @BeforeAll static void certificates() throws Exception {
            run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=ca",
                    "-keyout", "ca.key", "-out", "ca.crt");
            run("openssl", "x509", "-in", "ca.crt", "-outform", "der", "-out", "ca.der");
            run("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=other",
                    "-keyout", "other.key", "-out", "other.crt");
            run("openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-keyout", "server.key",
                    "-out", "server.csr");
            Files.writeString(folder.resolve("names"), "subjectAltName=DNS:localhost");
            run("openssl", "x509", "-req", "-in", "server.csr", "-CA", "ca.crt", "-CAkey", "ca.key",
                    "-CAcreateserial", "-days", "2", "-extfile", "names", "-out", "server.crt");
            Path data = Path.of(Servers.sql("postgres", "SHOW data_directory").getFirst());
            for (String file : List.of("server.crt", "server.key")) {
                Files.deleteIfExists(data.resolve(file));
                Files.createFile(data.resolve(file), java.nio.file.attribute.PosixFilePermissions.asFileAttribute(
                        java.nio.file.attribute.PosixFilePermissions.fromString("rw-------")));
                Files.write(data.resolve(file), Files.readAllBytes(folder.resolve(file)));
            }
            Servers.sql("postgres", "ALTER SYSTEM SET ssl = on");
            Servers.sql("postgres", "SELECT pg_reload_conf()");
            Wait.until("it accepts TLS", () -> Servers.sql("postgres", "SHOW ssl").equals(List.of("on")));
        }

        private static void run(String... command) throws Exception {
            Process process = new ProcessBuilder(command).directory(Files.createDirectories(folder).toFile())
                    .redirectErrorStream(true).start();
            String output = new String(process.getInputStream().readAllBytes());
            assertEquals(0, process.waitFor(), output);
        }

        @ParameterizedTest @CsvSource({"require,localhost,", "verify-ca,127.0.0.1,ca.crt",
                "verify-full,localhost,ca.crt", "verify-full,localhost,ca.der"})
        void is_used_over_TLS(String mode, String host, String authority) throws Exception {
            String database = Servers.newDatabase();
            String file = authority == null ? "" : folder.resolve(authority).toString();
            try (Instance board = new Instance("tls-" + mode, database, "DB_HOST", host, "DB_SSLMODE", mode,
                    "DB_SSLROOTCERT", file)) {
                board.awaitReady();
                board.save("a", "secret").expect(201);
                assertEquals(List.of("0"), Servers.sql("postgres",
                        "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) "
                        + "WHERE datname = '" + database + "' AND application_name LIKE 'threefold%' AND NOT ssl"));
            }
        }

        @ParameterizedTest @CsvSource({"verify-ca,localhost,other.crt", "verify-full,127.0.0.1,ca.crt"})
        void is_not_used_if_its_certificate_is_wrong(String mode, String host, String authority) throws Exception {
            try (Instance board = new Instance("wary", Servers.newDatabase(), "DB_HOST", host, "DB_SSLMODE", mode,
                    "DB_SSLROOTCERT", folder.resolve(authority).toString())) {
                board.save("a", "not to this server").unavailable();
                awaitLog("certificate|hostname|PKIX");
            }
        }
    }

    /** Skipped without a PgBouncer at /usr/sbin/pgbouncer, or where PGBOUNCER names one. */
    @Nested class Behind_PgBouncer {
        private static final String PROGRAM = System.getenv().getOrDefault("PGBOUNCER", "/usr/sbin/pgbouncer");

        @ParameterizedTest @ValueSource(strings = {"session", "transaction"})
        void all_works(String mode) throws Exception {
            Assumptions.assumeTrue(Files.isExecutable(Path.of(PROGRAM)), "there is no PgBouncer");
            Process print = new ProcessBuilder(PROGRAM, "--version").start();
            String version = new String(print.getInputStream().readAllBytes()).replaceAll("(?s)\\D*1\\.(\\d+).*", "$1");
            boolean prepares = Integer.parseInt(version) >= 21; // in transaction mode too
            Assumptions.assumeTrue(prepares || mode.equals("session"), "PgBouncer 1." + version
                    + " is older than 1.21");
            String database = Servers.newDatabase();
            int port = Servers.freePort();
            Process pooler = start(mode, port, prepares);
            try (Instance one = new Instance("pooled-1", database, "DB_PORT", "" + port);
                 Instance two = new Instance("pooled-2", database, "DB_PORT", "" + port)) {
                one.awaitReady();
                two.awaitReady();
                try (EventsTest.Subscriber subscriber = new EventsTest.Subscriber(one, "")) {
                    List<Long> stored = new ArrayList<>();
                    for (int i = 0; i < 60; i++) stored.add((i % 2 == 0 ? one : two).save("a", "pooled " + i)
                            .expect(201).id());
                    assertEquals(stored.getFirst(), one.get("/api/messages/" + stored.getFirst()).expect(200).id());
                    two.get("/api/messages?limit=50&before=" + stored.getLast()).expect(200);
                    Wait.until("all are received", () -> subscriber.ids().containsAll(stored));
                    subscriber.checkOrder();
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
            if (EmbeddedTest.asRoot()) { // PgBouncer does not run as root
                A_PostgreSQL_with_TLS.run("chmod", "-R", "a+rX", folder.toString(), Servers.FOLDER.toString());
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

        @Test void that_rejects_a_command_is_up() throws Exception {
            try (Jedis jedis = in(3);
                 Instance board = new Instance("rejected", Servers.newDatabase(), "REDIS_DB", "3")) {
                board.awaitReady();
                jedis.lpush("visits:total", "no number");
                for (int i = 0; i < 20; i++) {
                    assertFalse(board.counts());
                    assertEquals("ready", board.get("/readyz").expect(200).text("status"));
                }
                jedis.del("visits:total");
                assertEquals(1, board.visits());
            }
        }

        @Test void that_became_a_replica_is_unavailable_until_it_is_a_primary() throws Exception {
            try (RedisProgram server = new RedisProgram(); Jedis jedis = new Jedis("127.0.0.1", server.port);
                 Instance board = server.board("replica")) {
                board.awaitReady();
                jedis.replicaof("127.0.0.1", 1);
                assertFalse(board.counts());
                Wait.until("it is", Duration.ofSeconds(1), () -> board.status().equals("degraded"));
                for (int i = 0; i < 40; i++) { // longer than several probes
                    assertEquals("degraded", board.get("/readyz").expect(200).text("status"), "and stays so");
                    Thread.sleep(50);
                }
                jedis.replicaofNoOne();
                Wait.until("it counts again", Wait.PROMISED, board::counts);
            }
        }

        /** As managed servers, and proxies before them, do after a while. */
        @Test void that_closes_connections_is_up() throws Exception {
            try (RedisProgram server = new RedisProgram("timeout 2"); Instance board = server.board("idle")) {
                board.awaitReady();
                board.visits();
                board.total();
                Thread.sleep(3_500);
                assertEquals(2, board.visits(), "an idle connection is tested before a count");
                assertEquals(2, board.total());
                try (Jedis jedis = new Jedis("127.0.0.1", server.port)) {
                    jedis.sendCommand(redis.clients.jedis.Protocol.Command.CLIENT, "KILL", "TYPE", "normal");
                }
                for (int i = 0; i < 60; i++) { // longer than two probes
                    board.get("/").expect(200);
                    board.get("/api/visits");
                    assertEquals("ready", board.status());
                    Thread.sleep(10);
                }
                assertTrue(board.visits() > 2);
                assertFalse(LogCapture.all().toString().contains("store_unavailable"), "" + LogCapture.last(5));
            }
        }

        /** A second connection would take the time that the response may take. */
        @Test void that_does_not_answer_on_an_idle_connection_is_not_asked_on_another_one() throws Exception {
            try (FaultProxy proxy = new FaultProxy(Servers.redisPort()); Redis redis = new Redis(Config.from(
                    Servers.environment("none", "REDIS_PORT", "" + proxy.port())))) {
                var session = redis.session();
                session.run(Jedis::ping);
                Thread.sleep(1_100); // then it is idle
                proxy.hang();
                assertThrows(StoreException.class, () -> session.run(Jedis::ping));
                assertEquals(1, proxy.accepted());
            }
        }

        @Test void that_is_a_replica_is_not_read_either() throws Exception {
            try (RedisProgram replica = new RedisProgram("replicaof 127.0.0.1 1");
                 Instance board = replica.board("old-total")) {
                for (int i = 0; i < 10; i++) {
                    board.get("/api/visits").unavailable();
                    assertFalse(board.counts());
                    Thread.sleep(100);
                }
                try (Redis redis = new Redis(Config.from(Servers.environment("none", "REDIS_PORT", "" + replica.port,
                        "REDIS_PASS", "")))) {
                    assertThrows(StoreException.class, new Counters(redis, "reader", new Metrics())::poll,
                            "each connection is to a primary");
                }
            }
        }

        /** A Sentinel that was cut off names the earlier primary; here that one still answers as well. */
        @Test void is_the_one_that_most_Sentinels_name() throws Exception {
            try (RedisProgram now = new RedisProgram(); RedisProgram before = new RedisProgram();
                 RedisProgram stale = sentinel(before, 3);
                 RedisProgram one = sentinel(now, 4); RedisProgram other = sentinel(now, 4);
                 Jedis counts = new Jedis("127.0.0.1", now.port)) {
                counts.set("visits:total", "100");
                String[] environment = {"REDIS_HOST", "", "REDIS_PASS", "", "REDIS_SENTINELS",
                        "127.0.0.1:" + stale.port + ",127.0.0.1:" + one.port + ",127.0.0.1:" + other.port};
                try (Instance board = new Instance("elected", Servers.newDatabase(), environment)) {
                    board.awaitReady();
                    assertEquals(101, board.visits());
                    assertEquals(101, board.total());
                }
                one.kill();
                try (Instance board = new Instance("undecided", Servers.newDatabase(), environment)) {
                    awaitLog("do not agree");
                    assertFalse(board.counts());
                }
                try (Jedis old = new Jedis("127.0.0.1", before.port)) { assertFalse(old.exists("visits:total")); }
            }
        }

        /** Without a replica that has the count, a new primary might give its number again. */
        @Test void that_has_to_reach_a_replica_gives_no_number_without_one() throws Exception {
            try (RedisProgram primary = new RedisProgram();
                 Instance board = primary.board("replicated", "REDIS_WAIT_REPLICAS", "1")) {
                board.awaitReady();
                assertFalse(board.counts());
                assertEquals("ready", board.status());
                try (RedisProgram replica = new RedisProgram("replicaof 127.0.0.1 " + primary.port)) {
                    Wait.until("a count reaches " + replica.port, board::counts);
                    long visit = board.visits();
                    assertEquals(visit + 1, board.visits());
                }
            }
        }

        private static RedisProgram sentinel(RedisProgram primary, int epoch) throws Exception {
            return new RedisProgram("sentinel monitor threefold 127.0.0.1 " + primary.port + " 2",
                    "sentinel config-epoch threefold " + epoch, "sentinel down-after-milliseconds threefold 60000");
        }

        @Test void with_few_rights_for_its_user_is_enough() throws Exception {
            try (Jedis jedis = in(4)) {
                jedis.aclSetUser("guest", "reset", "resetchannels", "on", ">pass", "~visits:*", "~{visits:total}:*",
                        "&threefold:*", "+@all", "-@admin");
                try (Instance board = new Instance("guest", Servers.newDatabase(), "REDIS_USER", "guest",
                        "REDIS_PASS", "pass", "REDIS_DB", "4")) {
                    board.awaitReady();
                    assertEquals(1, board.visits());
                    assertEquals(1, board.total());
                }
            }
        }

        /** A Redis Cluster rejects commands whose keys are not all in one slot. */
        @Test void that_is_a_cluster_counts() throws Exception {
            try (RedisProgram server = new RedisProgram("cluster-enabled yes", "save \"\"");
                 Jedis jedis = new Jedis("127.0.0.1", server.port)) {
                jedis.clusterAddSlots(java.util.stream.IntStream.range(0, 16384).toArray());
                Wait.until("all slots are served", () -> jedis.clusterInfo().contains("cluster_state:ok"));
                try (Instance board = server.board("slots")) {
                    board.awaitReady();
                    assertEquals(1, board.visits());
                    assertEquals(1, board.total());
                    Wait.until("a heartbeat arrives", () -> board.get("/api/instances").body().contains("\"ready\""));
                }
            }
        }

        /** Names of containers come and go; their counts stay in the total. */
        @Test void keeps_the_counts_of_instances_long_gone_as_one_number() throws Exception {
            try (Jedis jedis = in(7)) {
                String byInstance = "{visits:total}:by-instance";
                jedis.set("visits:total", "20");
                jedis.hset(byInstance, Map.of("earlier instances", "3", "gone1", "4", "gone2", "8", "here", "5"));
                Config config = Config.from(Servers.environment("none", "REDIS_DB", "7"));
                try (Redis redis = new Redis(config);
                     Counters counters = new Counters(redis, "settled", new Metrics())) {
                    counters.compact(Set.of()); // while it is unknown which instances live
                    assertEquals(4, counters.poll().byInstance().size());
                    counters.compact(Set.of("here", "settled"));
                    assertEquals(Map.of("earlier instances", 15L, "here", 5L), counters.poll().byInstance());
                    assertEquals(20, counters.poll().total());
                    jedis.hset(byInstance, "gone3", "0");
                    counters.compact(Set.of("here", "settled"));
                    assertTrue(counters.poll().byInstance().containsKey("gone3"), "not more than once in ten seconds");
                }
            }
        }

        @Test void on_which_other_programs_publish_does_no_harm() throws Exception {
            try (Jedis jedis = Servers.jedis(); Instance board = new Instance("calm");
                 EventsTest.Subscriber subscriber = new EventsTest.Subscriber(board, "")) {
                board.awaitReady();
                for (String text : List.of("", "\n", "visits", "1", "\u0000\uffff", "{}", "[]", "{\"instance\":[]}",
                        "{\"instance\":\"<b>\",\"state\":\"ready\",\"since\":\"\",\"version\":\"\"}",
                        "{\"instance\":\"a\",\"state\":\"" + "x".repeat(2_000) + "\"}"))
                    jedis.publish("threefold:instances:0", text);
                subscriber.awaits(board.save("a", "still sent").expect(201));
                long visit = board.visits();
                Wait.until("the visit is received", () -> subscriber.lastVisits() >= visit);
                assertFalse(board.get("/api/instances").body().contains("<b>"));
                assertFalse(LogCapture.all().toString().contains("internal_error"), "" + LogCapture.last(5));
            }
        }

        @Test void with_an_odd_counter_ends_no_thread() throws Exception {
            try (Jedis jedis = in(6); Instance board = new Instance("odd", Servers.newDatabase(), "REDIS_DB", "6");
                 EventsTest.Subscriber subscriber = new EventsTest.Subscriber(board, "")) {
                board.awaitReady();
                jedis.hset("{visits:total}:by-instance", "odd", "many");
                board.get("/api/visits").unavailable();
                board.get("/", "Accept", "text/html").expect(200);
                Thread.sleep(11_000); // counts are compacted each ten seconds, and its failure is no outage
                assertEquals("ready", board.get("/readyz").expect(200).text("status"));
                assertFalse(board.counts());
                board.get("/api/visits");
                Thread.sleep(700);
                jedis.flushDB();
                long visit = board.visits();
                Wait.until("the visit is received", () -> subscriber.lastVisits() == visit);
            }
        }

        /** As managed ones are; Java's own setting names the certificates to trust. */
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
            try (TlsFront front = new TlsFront(own, Servers.redisPort());
                 Program board = Program.java(Servers.environment(Servers.newDatabase(), "REDIS_HOST", host,
                         "REDIS_PORT", "" + front.port(), "REDIS_TLS", "true", "JAVA_TOOL_OPTIONS",
                         "-Djavax.net.ssl.trustStore=" + trust + " -Djavax.net.ssl.trustStorePassword=secret"))) {
                Wait.until("it serves", Duration.ofSeconds(20), () -> board.get("/readyz").status() == 200);
                if (good) board.awaitReady();
                assertEquals(good, board.counts());
            }
        }
    }

    /** A Redis or a Sentinel of a test's own, with these lines in its configuration. */
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

        /** An instance on this Redis and a new database. */
        Instance board(String name, String... namesAndValues) {
            return new Instance(name, Servers.newDatabase(),
                    Caller.and(namesAndValues, "REDIS_PORT", "" + port, "REDIS_PASS", ""));
        }

        void kill() { process.destroyForcibly().onExit().join(); }

        @Override public void close() { kill(); }
    }

    /** A standby of the PostgreSQL that all tests share: a copy of its folder, which follows no primary. */
    private static final class Standby implements AutoCloseable {
        final int port = Servers.freePort();
        private final List<String> pgCtl;
        private final Path folder;

        Standby(Path folder) throws Exception {
            this.folder = folder;
            Servers.databasePort(); // unpacks the programs
            Path programs = programs();
            pgCtl = EmbeddedTest.asRoot() ? List.of("unshare", "-U", programs.resolve("pg_ctl").toString())
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

    /** A proxy that ends TLS. */
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
                    } catch (IOException e) { /* one of them was closed */ }
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
