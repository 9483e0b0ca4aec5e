# JBang compiles the service in its own image; the final image holds only a Java runtime. JBang has no image with Java
# 25, so a JDK 25 is copied beside its own. (No `# syntax=` line: the engine would have to pull it.)
ARG JBANG_IMAGE=jbangdev/jbang:0.132.1-java-21
ARG JDK_IMAGE=eclipse-temurin:25-jdk
ARG RUNTIME_IMAGE=busybox:1.37-glibc

FROM ${JDK_IMAGE} AS jdk

# --- The //DEPS lines alone. Their files change only with a dependency, so a changed line of code downloads nothing.
FROM ${JBANG_IMAGE} AS deps
WORKDIR /deps
COPY Service.java .
# The image gets what stands above the line on the embedded servers; the compiler and the training get everything, with
# PostgreSQL's programs for this CPU alone.
RUN sed '/^\/\/ Only for/q' Service.java | grep '^//\(JAVA\|DEPS\)' > runtime.java \
 && case $(uname -m) in aarch64) system=linux-arm64v8 ;; *) system=linux-amd64 ;; esac \
 && grep '^//\(JAVA\|DEPS\)' Service.java | grep -v "postgres-binaries-[^:]*" > training.java \
 && grep "postgres-binaries-$system:" Service.java >> training.java \
 && for list in runtime training; do echo "class $list {}" >> $list.java; done && rm Service.java

FROM ${JBANG_IMAGE} AS build
WORKDIR /opt/threefold
COPY --from=jdk /opt/java/openjdk /opt/jdk
# --- A Java runtime of the modules that the service uses.
RUN /opt/jdk/bin/jlink --output java --no-header-files --no-man-pages --strip-java-debug-attributes --compress zip-6 \
          --exclude-files '**.debuginfo' \
# (jdk.crypto.ec: TLS to PostgreSQL needs elliptic curves)
          --add-modules java.logging,java.management,java.naming,java.sql,jdk.crypto.ec,jdk.management,jdk.unsupported \
# The libraries that busybox:glibc lacks: libz and libstdc++ for Debian's JDK, libdl and librt for Temurin's.
 && ldd java/bin/java java/lib/*.so java/lib/server/*.so | awk '/=> \// { print $3 }' | sort -u \
    | grep -vE "$PWD|/(libc|libm|libpthread|libresolv)\.so" | xargs -r cp -Lt java/lib
# --- The part of a locale by which Java reads its environment as UTF-8; busybox has none.
RUN install -D /usr/lib/locale/C.utf8/LC_CTYPE locale/C.utf8/LC_CTYPE
# --- Dependencies.
COPY --from=deps /deps /deps
COPY jbang /deps/bin/
# A build container cannot reach a proxy at the caller's loopback address.
RUN https_proxy=${https_proxy-} http_proxy=${http_proxy-} \
 && case ,${https_proxy#*//},${http_proxy#*//} in \
      *,localhost* | *,127.* | *,\[::1\]*) unset https_proxy http_proxy HTTPS_PROXY HTTP_PROXY ;; \
    esac \
 && for list in runtime training; do \
      mkdir /deps/$list \
      && /deps/bin/jbang info classpath /deps/$list.java | tr ':' '\n' | grep -v "/$list.jar$" \
       | xargs cp -t /deps/$list || exit; \
    done && mv /deps/runtime lib
# --- The service.
COPY Service.java init.sql openapi.json page/ scripts/embedded /source/
RUN mkdir /classes && cd /source \
 && /opt/jdk/bin/javac -Xlint:-options -proc:none -d /classes -cp "/deps/training/*" Service.java \
 && rm Service.java && /opt/jdk/bin/jar --create --file /opt/threefold/service.jar -C /classes . -C /source .
COPY <<'EOF_OPTIONS' java.options
# The shares of the container's 192 MB (docker-compose.yml): the heap, with at most 16 MB for bodies and slow clients;
# the I/O buffers; the classes; compiled code.
-Xmx64m
-XX:MaxDirectMemorySize=24m
-XX:MaxMetaspaceSize=48m
-XX:ReservedCodeCacheSize=24m
# The collector with the least memory of its own. The training below has to use it too, on a machine of any size.
-XX:+UseSerialGC
# The C library would keep the memory that Java's compilers have freed (docs/benchmarks.md).
-XX:TrimNativeHeapInterval=10000
# The optimizing compiler takes CPU from the first requests, so it waits for ten times as many calls as usual
# (docs/benchmarks.md).
-XX:Tier4InvocationThreshold=50000
-XX:Tier4MinInvocationThreshold=6000
-XX:Tier4CompileThreshold=150000
-XX:Tier4BackEdgeThreshold=400000
# Docker restarts an instance that exits, not one that is out of memory and stuck.
-XX:+ExitOnOutOfMemoryError
-Xlog:disable
-Xlog:all=error:stderr
# Logs the reason if the AOT cache (below) does not fit; the service then starts without the cache.
-Xlog:aot*=warning:stderr
# XNIO registers itself with JMX, which the service does not use. This class cannot build JMX's server, so XNIO goes
# without: less memory and a quicker start (docs/benchmarks.md).
-Djavax.management.builder.initial=java.lang.Object
EOF_OPTIONS
RUN echo "-cp /opt/threefold/service.jar:$(printf '%s\n' /opt/threefold/lib/*.jar | paste -sd:)" >> java.options

# --- The training run: the service answers all kinds of requests under its final options and class path, and Java
#     writes the AOT cache of its classes. Method profiles stay out (docs/benchmarks.md). PostgreSQL refuses root.
FROM build AS training
COPY image/Train.java /training/
RUN /opt/jdk/bin/javac -proc:none -d /training -cp "service.jar:/deps/training/*" /training/Train.java && chown nobody .
USER nobody
RUN /opt/jdk/bin/java -XX:+UseSerialGC -cp "/training:service.jar:/deps/training/*" Train \
    java/bin/java @java.options -XX:+UnlockDiagnosticVMOptions -XX:-AOTRecordTraining \
      -XX:AOTCacheOutput=service.aot Service && ls -l

FROM ${RUNTIME_IMAGE}
WORKDIR /opt/threefold
# One layer: the cache checks the size and time of its files, and another layer may have other times.
COPY --from=training --chown=0:0 /opt/threefold .
ENV LC_CTYPE=C.UTF-8 \
    LOCPATH=/opt/threefold/locale \
    LD_LIBRARY_PATH=/opt/threefold/java/lib \
    MALLOC_ARENA_MAX=2
USER 10001:10001
# The build fails if the cache does not fit, or if the locale does not: a password outside ASCII would be misread.
RUN output=$(java/bin/java @java.options -XX:AOTMode=on -XX:AOTCache=/opt/threefold/service.aot \
      -XshowSettings:properties -version 2>&1) && echo "$output" | grep 'sun.jnu.encoding = UTF-8' \
 || { echo "$output"; exit 1; }
EXPOSE 9999
# Process 1 is java itself, so that SIGTERM reaches it.
ENTRYPOINT ["/opt/threefold/java/bin/java", "@/opt/threefold/java.options", \
            "-XX:AOTCache=/opt/threefold/service.aot", "Service"]
