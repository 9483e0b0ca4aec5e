// Writes the shell that stands inside other files into files of its own, for ShellCheck: node snippets.mjs FOLDER FILE…
import { readFileSync, writeFileSync } from 'node:fs';
import { parse } from 'yaml';

const [folder, ...files] = process.argv.slice(2);

/** The RUN lines, each with its continuations; comments may stand between those. */
function* ofDockerfile(text) {
  const lines = text.split('\n').filter(line => !line.startsWith('#'));
  for (let i = 0; i < lines.length; i++) {
    if (!/^RUN /.test(lines[i])) continue;
    let command = lines[i].slice(4);
    while (command.endsWith('\\')) command = command + '\n' + lines[++i];
    yield ['sh', command];
  }
}

/** Health checks, entry points and commands that are scripts, scripts in the environment; Compose writes $$ for $. */
function* ofCompose(text) {
  for (const service of Object.values(parse(text, { merge: true }).services)) {
    const environment = Object.values(service.environment ?? {}).filter(value => /\n/.test(value));
    const inline = [service.entrypoint ?? [], service.command ?? []]
      .filter(([shell, option]) => /(^|\/)(ba)?sh$/.test(shell) && /c$/.test(option))
      .map(([shell, , script]) => [shell.split('/').pop(), script]);
    for (const found of [service.healthcheck?.test?.[0] === 'CMD-SHELL' ? ['sh', service.healthcheck.test[1]] : null,
      ...inline, ...environment.map(value => ['sh', value])])
      if (found) yield [found[0], found[1].replaceAll('$$', '$')];
  }
}

function* ofWorkflow(text) {
  for (const job of Object.values(parse(text).jobs))
    for (const step of job.steps) if (step.run) yield ['bash', step.run];
}

for (const file of files) {
  const text = readFileSync(file, 'utf8');
  const inside = /Dockerfile$/.test(file) ? ofDockerfile : /compose\.yml$/.test(file) ? ofCompose : ofWorkflow;
  [...inside(text)].forEach(([shell, script], at) =>
    writeFileSync(`${folder}/${file.replaceAll('/', '_')}-${at + 1}.sh`, `# shellcheck shell=${shell}\n${script}\n`));
}
