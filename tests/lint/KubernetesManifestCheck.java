///usr/bin/env jbang "$0" "$@" ; exit $?
//JAVA 21+
//DEPS io.kubernetes:client-java-api:24.0.0
//DEPS org.yaml:snakeyaml:2.5
//DEPS org.slf4j:slf4j-nop:2.0.20

import com.google.gson.Gson;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import com.google.gson.JsonParser;
import io.kubernetes.client.openapi.JSON;
import org.yaml.snakeyaml.Yaml;

import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;

/**
 * Checks objects of Kubernetes, as {@code kubectl kustomize} prints them, against the schema of its API: each field has
 * to be one that exists, of the right type, and none that is required may be missing. The classes of the project's own
 * Java client are made from that schema and know it. It also checks what no schema says: that each name that one object
 * uses for another is that of an object which is there, and that each selector of labels finds an object.
 *
 * <p>{@code kubectl kustomize cluster/kubernetes | jbang tests/lint/KubernetesManifestCheck.java}
 */
public final class KubernetesManifestCheck {
    private static final Map<String, String> GROUPS = Map.of("v1", "V1", "apps/v1", "V1", "policy/v1", "V1",
            "autoscaling/v2", "V2", "networking.k8s.io/v1", "V1");
    private static final List<String> NEEDED = List.of("Deployment", "Service", "PodDisruptionBudget",
            "HorizontalPodAutoscaler", "Ingress", "ConfigMap", "Namespace");

    private final List<String> wrong = new ArrayList<>();
    private final Map<String, JsonObject> objects = new TreeMap<>();

    public static void main(String[] args) {
        KubernetesManifestCheck check = new KubernetesManifestCheck();
        for (Object document : new Yaml().loadAll(System.in))
            if (document != null) check.add(JsonParser.parseString(new Gson().toJson(document)).getAsJsonObject());
        check.references();
        check.wrong.forEach(System.out::println);
        System.out.println(check.wrong.isEmpty() ? "valid: " + String.join(", ", check.objects.keySet()) : "FAILED");
        System.exit(check.wrong.isEmpty() ? 0 : 1);
    }

    private void add(JsonObject object) {
        String kind = object.get("kind").getAsString(), group = object.get("apiVersion").getAsString();
        String name = kind + "/" + object.getAsJsonObject("metadata").get("name").getAsString();
        objects.put(name, object);
        try {
            Class<?> type = Class.forName("io.kubernetes.client.openapi.models." + GROUPS.get(group) + kind);
            type.getMethod("validateJsonElement", JsonElement.class).invoke(null, object);
            new JSON(); // its own Gson, which knows what dates and quantities look like
            JSON.getGson().fromJson(object, type);
        } catch (ClassNotFoundException e) {
            wrong.add(name + ": expected an API that this check knows, saw " + group);
        } catch (ReflectiveOperationException e) {
            wrong.add(name + ": " + e.getCause().getMessage());
        } catch (RuntimeException e) {
            wrong.add(name + ": " + e.getMessage());
        }
    }

    private void references() {
        for (String kind : NEEDED)
            if (objects.keySet().stream().noneMatch(name -> name.startsWith(kind + "/"))) wrong.add("no " + kind);
        if (!wrong.isEmpty()) return;
        JsonObject pod = at(objects.get("Deployment/web"), "spec", "template").getAsJsonObject();
        JsonObject labels = at(pod, "metadata", "labels").getAsJsonObject();
        selects("Deployment/web", labels, "spec", "selector", "matchLabels");
        selects("Service/web", labels, "spec", "selector");
        selects("PodDisruptionBudget/web", labels, "spec", "selector", "matchLabels");
        at(pod, "spec", "topologySpreadConstraints").getAsJsonArray().forEach(constraint ->
                selects("topologySpreadConstraints", at(constraint, "labelSelector", "matchLabels"), labels));
        JsonObject scaler = objects.get("HorizontalPodAutoscaler/web");
        there("Deployment/" + at(scaler, "spec", "scaleTargetRef", "name").getAsString());
        at(at(objects.get("Ingress/web"), "spec", "rules").getAsJsonArray().get(0), "http", "paths").getAsJsonArray()
                .forEach(path -> there("Service/" + at(path, "backend", "service", "name").getAsString()));
        JsonElement container = at(pod, "spec", "containers").getAsJsonArray().get(0);
        JsonElement from = at(container, "envFrom").getAsJsonArray().get(0);
        there("ConfigMap/" + at(from, "configMapRef", "name").getAsString());
        String port = at(at(container, "ports").getAsJsonArray().get(0), "name").getAsString();
        // What asks a store must not kill: the pods would all be restarted for as long as it is unavailable.
        Map<String, String> probes = Map.of("startupProbe", "/healthz", "livenessProbe", "/healthz",
                "readinessProbe", "/readyz");
        probes.forEach((probe, path) -> {
            JsonElement get = at(container, probe, "httpGet");
            if (!at(get, "port").getAsString().equals(port)) wrong.add(probe + ": no such port");
            if (!at(get, "path").getAsString().equals(path)) wrong.add(probe + ": expected " + path + ", saw " + get);
        });
    }

    private void selects(String name, JsonObject labels, String... path) {
        selects(name, at(objects.get(name), path), labels);
    }

    private void selects(String name, JsonElement selector, JsonObject labels) {
        JsonObject wanted = selector.getAsJsonObject();
        if (wanted.isEmpty() || !labels.entrySet().containsAll(wanted.entrySet()))
            wrong.add(name + ": expected a selector of the instances' labels " + labels + ", saw " + selector);
    }

    private void there(String name) {
        if (!objects.containsKey(name)) wrong.add(name + " is named, and not there");
    }

    private static JsonElement at(JsonElement where, String... path) {
        for (String name : path) where = where.getAsJsonObject().get(name);
        return where;
    }
}
