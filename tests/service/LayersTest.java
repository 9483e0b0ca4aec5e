import org.junit.jupiter.api.Test;

import java.io.IOException;
import java.nio.file.Files;
import java.util.*;
import java.util.regex.Matcher;
import java.util.regex.Pattern;

import static org.junit.jupiter.api.Assertions.assertEquals;
import static org.junit.jupiter.api.Assertions.assertTrue;

/** Service.java's sections are layers: a type names only types of its own section and of those with a higher number. */
class LayersTest {
    private static final Pattern SECTION = Pattern.compile("// -+ ([1-9]) [A-Z].*");
    private static final Pattern TYPE = Pattern.compile(
            "(?:public |final |abstract )*(?:class|record|interface|enum) (\\w+).*");

    private record Line(int number, int section, String code) {}

    @Test void name_only_what_is_below() throws IOException {
        List<Line> lines = new ArrayList<>();
        Map<String, Integer> sections = new HashMap<>();
        int section = 0, number = 0;
        for (String text : Files.readAllLines(Program.root().resolve("Service.java"))) {
            number++;
            Matcher heading = SECTION.matcher(text), type = TYPE.matcher(text);
            if (heading.matches()) section = Integer.parseInt(heading.group(1));
            if (type.matches()) sections.put(type.group(1), section);
            lines.add(new Line(number, section, text.replaceAll("\"(\\\\.|[^\"\\\\])*\"|//.*|^\\s*/?\\*.*", "")));
        }
        assertTrue(section == 1 && sections.size() > 30, "the sections and types are found: " + sections);
        List<String> upwards = new ArrayList<>();
        for (Line line : lines)
            for (Matcher word = Pattern.compile("(?<![.\\w])[A-Z]\\w+").matcher(line.code); word.find(); )
                if (sections.getOrDefault(word.group(), 9) < line.section)
                    upwards.add("line " + line.number + " names " + word.group() + ": " + line.code.strip());
        assertEquals(List.of(), upwards);
    }
}
