///usr/bin/env jbang "$0" "$@" ; exit $?
//JAVA 21+
//DEPS io.kubernetes:client-java-api:24.0.0
//DEPS org.yaml:snakeyaml:2.5
//DEPS org.slf4j:slf4j-nop:2.0.20

import com.google.gson.Gson;
import com.google.gson.JsonElement;
import com.google.gson.JsonObject;
import io.kubernetes.client.openapi.JSON;
import org.yaml.snakeyaml.Yaml;

import java.util.ArrayList;
import java.util.List;
import java.util.Map;
import java.util.TreeMap;

/**
 * Checks Kubernetes manifests against the schema of the API, which the classes of the project's Java client contain:
 * each field exists and has the right type, and no required field is missing. It also checks the references, which no
 * schema covers: a named object exists, and a selector matches the labels of the pods.
 *
 * <p>{@code kubectl kustomize cluster/kubernetes | jbang tests/lint/KubernetesManifestCheck.java}
 */
public final class KubernetesManifestCheck {
    private static final Map<String, String> APIS = Map.of("Namespace", "v1", "ConfigMap", "v1", "Service", "v1",
            "Deployment", "apps/v1", "Ingress", "networking.k8s.io/v1", "PodDisruptionBudget", "policy/v1",
            "HorizontalPodAutoscaler", "autoscaling/v2");

    private final List<String> findings = new ArrayList<>();
    private final Map<String, JsonObject> objects = new TreeMap<>();

    public static void main(String[] args) {
        KubernetesManifestCheck check = new KubernetesManifestCheck();
        new Yaml().loadAll(System.in).forEach(manifest -> check.checkSchema(new Gson().toJsonTree(manifest)));
        for (String kind : APIS.keySet())
            if (check.objects.keySet().stream().noneMatch(name -> name.startsWith(kind + "/")))
                check.findings.add("there is no " + kind);
        if (check.findings.isEmpty()) check.checkReferences();
        check.findings.forEach(System.out::println);
        System.out.println(check.findings.isEmpty() ? "valid: " + check.objects.keySet() : "FAILED");
        System.exit(check.findings.isEmpty() ? 0 : 1);
    }

    private void checkSchema(JsonElement manifest) {
        String kind = at(manifest, "kind").getAsString(), api = at(manifest, "apiVersion").getAsString();
        String name = kind + "/" + at(manifest, "metadata", "name").getAsString();
        objects.put(name, manifest.getAsJsonObject());
        if (!api.equals(APIS.get(kind))) findings.add(name + ": expected " + APIS.get(kind) + ", saw " + api);
        try {
            String version = api.substring(api.indexOf('/') + 1).toUpperCase(); // apps/v1: V1Deployment
            Class<?> type = Class.forName("io.kubernetes.client.openapi.models." + version + kind);
            type.getMethod("validateJsonElement", JsonElement.class).invoke(null, manifest);
            new JSON(); // sets up a Gson that knows dates and quantities
            JSON.getGson().fromJson(manifest, type);
        } catch (ReflectiveOperationException | RuntimeException e) {
            findings.add(name + ": " + (e.getCause() == null ? e : e.getCause().getMessage()));
        }
    }

    private void checkReferences() {
        JsonElement pod = at(objects.get("Deployment/web"), "spec", "template"), labels = at(pod, "metadata", "labels");
        JsonElement container = at(pod, "spec", "containers", "0");
        checkSelector("Deployment/web", at(objects.get("Deployment/web"), "spec", "selector", "matchLabels"), labels);
        checkSelector("Service/web", at(objects.get("Service/web"), "spec", "selector"), labels);
        checkSelector("PodDisruptionBudget/web",
                at(objects.get("PodDisruptionBudget/web"), "spec", "selector", "matchLabels"), labels);
        at(pod, "spec", "topologySpreadConstraints").getAsJsonArray().forEach(constraint ->
                checkSelector("topologySpreadConstraints", at(constraint, "labelSelector", "matchLabels"), labels));
        checkExists("Deployment", at(objects.get("HorizontalPodAutoscaler/web"), "spec", "scaleTargetRef", "name"));
        at(objects.get("Ingress/web"), "spec", "rules", "0", "http", "paths").getAsJsonArray()
                .forEach(path -> checkExists("Service", at(path, "backend", "service", "name")));
        checkExists("ConfigMap", at(container, "envFrom", "0", "configMapRef", "name"));
        // A probe of a store would restart or remove all pods while the store is unavailable.
        checkProbe(container, "startupProbe", "/healthz");
        checkProbe(container, "livenessProbe", "/healthz");
        checkProbe(container, "readinessProbe", "/readyz");
    }

    private void checkSelector(String name, JsonElement selector, JsonElement labels) {
        var wanted = selector.getAsJsonObject().entrySet();
        if (wanted.isEmpty() || !labels.getAsJsonObject().entrySet().containsAll(wanted))
            findings.add(name + ": expected a selector of the labels " + labels + ", saw " + selector);
    }

    private void checkExists(String kind, JsonElement name) {
        if (!objects.containsKey(kind + "/" + name.getAsString())) findings.add("no " + kind + " has the name " + name);
    }

    private void checkProbe(JsonElement container, String probe, String path) {
        String expected = path + " at " + at(container, "ports", "0", "name");
        JsonElement get = at(container, probe, "httpGet");
        String seen = at(get, "path").getAsString() + " at " + at(get, "port");
        if (!seen.equals(expected)) findings.add(probe + ": expected " + expected + ", saw " + seen);
    }

    /** The value at a path of names and indexes. */
    private static JsonElement at(JsonElement value, String... path) {
        for (String name : path)
            value = value.isJsonArray() ? value.getAsJsonArray().get(Integer.parseInt(name))
                    : value.getAsJsonObject().get(name);
        return value;
    }
}
