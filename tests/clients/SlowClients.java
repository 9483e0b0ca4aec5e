import java.io.IOException;
import java.io.OutputStream;
import java.net.InetSocketAddress;
import java.net.Socket;
import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

import static java.nio.charset.StandardCharsets.ISO_8859_1;
import static java.nio.charset.StandardCharsets.UTF_8;

/**
 * The rude clients of tests/stack/failover: they ask for much and read nothing, or a byte a second.
 *
 * <p>{@code java SlowClients.java HOST PORT MESSAGES VIEWERS PAGES SECONDS} stores so many of the longest messages, so
 * that there is much to send. Then it opens so many streams of events from the first of these on, and asks for so many
 * of the largest pages, HTML and JSON in turn, each on a connection of its own. Every second one reads a byte a
 * second, the others nothing. At the end it prints how many were open, and by the first bytes of each answer what they
 * were told. `unkind` are those that were refused without a word on when to come again. JDK 21, nothing else.
 */
public final class SlowClients {
    private static final Pattern CURSOR = Pattern.compile("\"cursor\":\"([0-9-]+)\"");
    private static final int HEAD = 1_024; // of an answer, at most: so much is read at the end

    private final String host;
    private final int port;
    private final List<Reader> readers = new ArrayList<>();

    private SlowClients(String host, int port) {
        this.host = host;
        this.port = port;
    }

    public static void main(String[] args) throws Exception {
        int[] numbers = new int[6];
        for (int i = 1; i < 6; i++) numbers[i] = Integer.parseInt(args[i]);
        new SlowClients(args[0], numbers[1]).run(numbers[2], numbers[3], numbers[4], numbers[5]);
    }

    private void run(int messages, int viewers, int pages, int seconds) throws Exception {
        Matcher before = CURSOR.matcher(answer("GET /api/messages?limit=1 HTTP/1.1", "", new byte[0]));
        if (!before.find()) throw new IOException("no page of messages was answered");
        for (int i = 0; i < messages; i++) storeAgainUntilItIs(i);
        for (int i = 0; i < viewers + pages; i++) {
            String path = i < viewers ? "/api/events?after=" + before.group(1)
                    : i % 2 == 0 ? "/?limit=100" : "/api/messages?limit=100";
            try {
                readers.add(new Reader(path));
            } catch (IOException e) { /* no room for more: as it should be */ }
        }
        long end = System.nanoTime() + seconds * 1_000_000_000L;
        while (System.nanoTime() < end) {
            Thread.sleep(1_000);
            for (int i = 0; i < readers.size(); i += 2) readers.get(i).readOne();
        }
        Map<String, Integer> told = new TreeMap<>();
        int unkind = 0;
        for (Reader reader : readers) {
            while (reader.head.length() < HEAD && reader.readOne()) { /* what is there */ }
            told.merge(reader.status(), 1, Integer::sum);
            if (reader.isUnkind()) unkind++;
        }
        System.out.println("open=" + readers.size() + " unkind=" + unkind + " told="
                + told.toString().replaceAll("[{} ]", "").replace('=', ':'));
        System.exit(0);
    }

    /** Others may have begun to read already; then a large body is told to come again. */
    private void storeAgainUntilItIs(int number) throws Exception {
        for (int tries = 1; ; tries++, Thread.sleep(500))
            try {
                store(number);
                return;
            } catch (IOException e) {
                if (tries == 60 || !e.getMessage().contains("Retry-After")) throw e;
            }
    }

    private void store(int number) throws IOException {
        byte[] body = ("{\"author\":\"test-failover\",\"body\":\"" + "\ud83d\ude42".repeat(1_990) + number + "\"}")
                .getBytes(UTF_8);
        String answer = answer("POST /api/messages HTTP/1.1", "Content-Type: application/json\r\n", body);
        if (!answer.startsWith("HTTP/1.1 201")) throw new IOException("a message was not stored: " + answer);
    }

    private String answer(String request, String headers, byte[] body) throws IOException {
        try (Socket socket = new Socket(host, port)) {
            OutputStream out = socket.getOutputStream();
            out.write((request + "\r\nHost: " + host + "\r\nConnection: close\r\n" + headers
                    + "Content-Length: " + body.length + "\r\n\r\n").getBytes(UTF_8));
            out.write(body);
            return new String(socket.getInputStream().readAllBytes(), UTF_8);
        }
    }

    private final class Reader {
        private final StringBuilder head = new StringBuilder(); // what it has read so far
        private final Socket socket = new Socket();

        Reader(String path) throws IOException {
            socket.setReceiveBufferSize(4_096);
            socket.connect(new InetSocketAddress(host, port), 2_000);
            socket.setSoTimeout(1);
            socket.getOutputStream().write(("GET " + path + " HTTP/1.1\r\nHost: " + host + "\r\nAccept: "
                    + (path.startsWith("/?") ? "text/html" : "*/*") + "\r\n\r\n").getBytes(UTF_8));
        }

        /** @return false if there was nothing, or it was closed: as it should be */
        boolean readOne() {
            byte[] one = new byte[1];
            try {
                if (socket.getInputStream().read(one) <= 0) return false;
                head.append(new String(one, ISO_8859_1));
                return true;
            } catch (IOException e) { return false; }
        }

        String status() { return head.length() < 12 ? "nothing" : head.substring(9, 12); }

        boolean isUnkind() {
            return (status().equals("503") || status().equals("429"))
                    && !head.toString().toLowerCase().contains("\r\nretry-after: ");
        }
    }
}
