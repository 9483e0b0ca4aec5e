# What people type. `make` lists the targets that are used most, `make help-all` lists all.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory
# Docker's legacy builder has no here-documents.
export DOCKER_BUILDKIT := 1

# Values that the caller's shell exports under these names are not meant for make: WSL exports NAME, csh HOST.
$(foreach name,NAME HOST ID N FILE CASE WHAT,$(if $(findstring environment,$(origin $(name))),$(eval $(name) :=)))

hint = { code=$$?; echo "Failed. \`make doctor\` lists what may be missing." >&2; exit $$code; }

# An interactive prompt needs a terminal; a pipe works too: echo 'SELECT 1' | make psql
no_tty = $$([ -t 0 ] || echo -T)

compose_all = docker compose --profile monitor --profile grafana

# A line with `##` is listed by `make`, a line with `##+` by `make help-all` alone.
list = awk -v all="$(1)" 'BEGIN { FS = ":.*\#\#[+]? " } /^\#\#@/ { heading = substr($$0, 5) } \
    /^[a-z-]+:.*\#\# / || all && /^[a-z-]+:.*\#\#[+] / { \
      if (heading) print heading; heading = ""; printf "  make %-15s %s\n", $$1, $$2 }' Makefile

.PHONY: $(shell sed -n 's/^\([a-z-]*\):.*/\1/p' Makefile)

help:
	@$(call list)
	@echo "make help-all lists all targets."

help-all:
	@$(call list,1)

##@ Run
up: ## build the image, start the stack, wait until it is healthy, print its address (BALANCE=least_conn)
	@. scripts/lib.sh && own_stack && check_nginx && claim_data || $(hint)
	@BALANCE=$$(. scripts/lib.sh && first_balance) docker compose up --detach --build --wait || \
	  { scripts/why >&2; false; } || $(hint)
	@. scripts/lib.sh && reload_nginx "$${BALANCE:-round-robin}" && \
	  say "Threefold answers at $${HTTPS:+$$HTTPS and }$$URL"

build: ## build the image of the service
	@. scripts/lib.sh && own_stack && docker compose build || $(hint)

run: ## run one instance without Docker (jbang Service.java)
	@./jbang Service.java

down: ## stop the stack and keep its data
	@. scripts/lib.sh && own_stack && $(compose_all) down --remove-orphans

clean: ##+ stop the stack and delete its data and image, after a question
	@name=$$(. scripts/lib.sh && own_stack && project); \
	  read -rp "This deletes all messages and counters of the stack \"$$name\", and the image. Type yes: " answer || :; \
	  [ "$$answer" = yes ] || { echo "Nothing was deleted."; exit 1; }
	@$(compose_all) down --remove-orphans --volumes
	@docker image rm --force "$$(docker compose config web1 | sed -n 's/^    image: //p' | tail -n 1)" >/dev/null

cert: ##+ make a certificate for https://localhost in the folder tls
	@scripts/cert

offline-images: ##+ build replacements of the official images if no registry can be reached (WHAT=monitor)
	@image/base-images/build $(WHAT)

##@ See
exercise: ## send visits and show live the share, response times and failures of each instance (RATE=, SECONDS_LONG=)
	@scripts/exercise

logs: ## follow the logs of all containers
	@docker compose logs --follow --tail 50

ps: ##+ list the containers and their health
	@docker compose ps --all

trace: ##+ find one request in all logs by its X-Request-Id: make trace ID=…
	@scripts/trace "$(ID)"

monitor: ##+ start Prometheus with rules and alerts on port 9090 (GRAFANA=1: and Grafana on port 3000)
	@scripts/monitor || $(hint)

psql: ##+ open a prompt of PostgreSQL
	@docker compose exec $(no_tty) postgres psql

redis-cli: ##+ open a prompt of Redis
	@docker compose exec $(no_tty) redis redis-cli

##@ Prove
test: ## test the service with real PostgreSQL and Redis, without Docker (NAME=…)
	@./jbang tests/service/ServiceTest.java $(NAME) && ./jbang tests/service/OpenApiTest.java

test-lb: ## check that nginx distributes requests as its load-balancing algorithm promises
	@tests/stack/lb

test-persist: ## restart, kill and recreate all containers; check that no data are lost
	@tests/stack/persist

test-failover: ## kill, stop and hang parts under load; check that no request fails and no data are lost (CASE=…)
	@tests/stack/failover $(CASE)

lab: ## see which test one changed line turns red, on a copy of the stack (docs/lab.md): make lab EXPERIMENT=3
	@tests/stack/lab $(or $(EXPERIMENT),list)

test-isolation: ##+ check that clients reach nginx alone and that the backend network has no way out
	@tests/stack/isolation

bench: ## measure the service beside what PostgreSQL, Redis and nginx can do (QUICK=1: in two minutes)
	@bench/run

compare-lb: ##+ compare the load-balancing algorithms, with equal instances and with a slow one (QUICK=1: in a minute)
	@bench/compare-lb

bench-peers: ##+ measure other frameworks beside the service (QUICK=1: in a few minutes)
	@bench/peers/run

lint: ##+ check each language by its own tool (scripts/lint shell html: two of the checks)
	@scripts/lint

test-lab: ##+ check that each change of docs/lab.md turns its test red, and that going back turns it green
	@tests/stack/lab

test-browser: ##+ use the page in a real browser while parts of the stack are killed
	@tests/browser/run

test-docs: ##+ run the commands of README.md and docs/
	@tests/stack/docs

test-environments: ##+ run the stack under other shells, proxies, settings, users and old volumes (CASE=…)
	@tests/stack/environments $(CASE)

test-monitor: ##+ check each target, rule and dashboard query; kill PostgreSQL and check the alert
	@tests/stack/monitor

test-upgrade: ##+ update an earlier version in place under load; check that no request fails and no data are lost
	@tests/stack/upgrade

##@ Operate
scale: ## run N web instances, 3 to 20, without a failed request: make scale N=6
	@scripts/scale "$(N)"

rolling: build ## build the image and replace the web instances one at a time, without a failed request
	@scripts/rolling

restart: ## restart all containers
	@. scripts/lib.sh && own_stack && check_nginx && docker compose restart && wait_ready

doctor: ## check what this machine has and lacks for all of these
	@scripts/doctor

backup: ##+ save messages and counters: make backup FILE=threefold.tar.gz
	@scripts/backup save "$(FILE)"

restore: ##+ replace messages and counters by a backup, after a question: make restore FILE=threefold.tar.gz
	@scripts/backup load "$(FILE)"

pictures: ##+ take the screenshots of README.md on a new, empty stack
	@scripts/pictures

##@ Three machines (docs/cluster.md)
cluster-up: ##+ make three machines inside this one and run the stack on a Docker Swarm of them (Linux, as root)
	@cluster/up

cluster-down: ##+ remove the three machines and their data
	@cluster/down

test-cluster: ##+ take machines away under load; check that no data are lost (CASE=…)
	@tests/stack/cluster $(CASE)

cluster-bench: ##+ compare six instances with three, and measure the cost of replication
	@bench/cluster

test-kubernetes: ##+ build cluster/kubernetes and check each field against the schema of the API
	@base=cluster/kubernetes; if command -v kubectl >/dev/null; then kubectl kustomize $$base; \
	  else kustomize build $$base; fi | ./jbang tests/lint/KubernetesManifestCheck.java
