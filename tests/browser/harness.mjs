// Runs the cases of page.mjs: windows of Chromium, waits for what they show, calls to the service and to ./run.
import assert from 'node:assert/strict';
import { createServer, request as httpRequest } from 'node:http';
import { createInterface } from 'node:readline';
import { chromium } from 'playwright-core';

export const { BASE_URL: BASE, OUT_DIR: OUT } = process.env;
export const RUN = Date.now().toString(36);

const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']
});

// ---- Cases

/** In these cases the network fails on purpose, which is no fault of the page. */
export const MAY_FAIL = { mayFail: true };
export const faults = []; // the browser's complaints, in all cases

const cases = [];
let current, passed = 0, failed = 0;

export const test = (name, options, body = options) => cases.push({ name, ...options, body });

function complain(text) {
  if (!(current.mayFail && text.startsWith('Failed to load resource'))) faults.push(current.name + ': ' + text);
}

async function runCase() {
  const began = Date.now();
  const timeout = new Promise((_, fail) =>
    setTimeout(() => fail(new Error('expected an end within 180 s')), 180_000).unref());
  try {
    await Promise.race([current.body(), timeout]);
    passed++;
    console.log(`  ok    ${current.name} (${Date.now() - began} ms)`);
  } catch (error) {
    failed++;
    console.log(`  FAIL  ${current.name}\n${String(error.stack).slice(0, 2500).replace(/^/gm, '        ')}`);
    for (const [i, page] of browser.contexts().flatMap(context => context.pages()).entries())
      await page.screenshot({ path: `${OUT}/failed-${failed}-${i}.png`, fullPage: true }).catch(() => {});
  }
  for (const context of browser.contexts()) await context.close();
}

/** Runs the cases with these words in their name. */
export async function runCases(words) {
  for (current of cases.filter(one => one.name.toLowerCase().includes(words.toLowerCase()))) await runCase();
  await browser.close();
  console.log(`screenshots are in ${process.env.OUT_SHOWN}`);
  console.log(`${passed} passed, ${failed} failed`);
  process.exit(failed === 0 && passed > 0 ? 0 : 1);
}

// ---- Windows

export async function newContext(options = {}) {
  const context = await browser.newContext({ viewport: { width: 1366, height: 900 }, locale: 'en-GB', ...options });
  context.setDefaultTimeout(15_000);
  return context;
}

/** Opens the page in a browser of its own; with a `context`, in another window of that browser. */
export async function visit({ base = BASE, context, ...options } = {}, path = '/') {
  context ??= await newContext(options);
  const page = await context.newPage();
  page.streams = []; // the instances that served the event stream, one after the other
  page.on('response', response => {
    if (response.url().includes('/api/events')) page.streams.push(response.headers()['x-instance-id']);
  });
  page.on('console', message => message.type() === 'error' && complain(message.text()));
  page.on('pageerror', error => complain(String(error)));
  page.on('dialog', dialog => complain('a dialog: ' + dialog.message()) || dialog.dismiss());
  page.answer = await page.goto(base + path);
  if (options.javaScriptEnabled !== false) await shows(page, '#link', 'live');
  return page;
}

export async function until(what, condition, millis = 20_000) {
  const end = Date.now() + millis;
  for (let last; ; await new Promise(done => setTimeout(done, 100))) {
    try {
      if (await condition()) return;
    } catch (error) {
      last = error;
    }
    if (Date.now() > end)
      throw new Error(`expected within ${millis / 1000} s: ${what}` + (last ? ` (${last.message})` : ''));
  }
}

/** Waits for a text, or with an expression for all of the text. */
export async function shows(page, selector, expected, millis) {
  let seen;
  await until(`${selector} shows "${expected}"`, async () => {
    seen = undefined;
    seen = (await page.$eval(selector, element => element.innerText)).trim();
    return expected instanceof RegExp ? expected.test(seen) : seen.includes(expected);
  }, millis).catch(error => { throw new Error(`${error.message}, saw "${seen}"`); });
}

export const becomes = (page, name, state, millis) =>
  shows(page, `#instances > [data-name="${name}"] .state`, new RegExp(`^${state}$`), millis);

export const messages = (page, text) => page.locator('#messages > li').filter({ hasText: text });
export const shownIds = page => page.$$eval('#messages > li', items => items.map(item => +item.dataset.id));

export async function isShownOnce(page, text, count = 1) {
  await messages(page, text).first().waitFor();
  assert.equal(await messages(page, text).count(), count, `messages with "${text}"`);
}

/** The page shows what is stored and nothing else, newest first, each once. */
export async function hasNoGap(page, millis) {
  const path = '/api/messages' + (new URL(page.url()).search || '?limit=100');
  await until('the page shows what is stored', async () => {
    const items = await page.$$eval('#messages > li', all =>
      all.map(item => item.dataset.id + ' ' + item.querySelector('.body').textContent));
    const stored = (await getJson(path)).messages.map(one => one.id + ' ' + one.body);
    assert.deepEqual(items.slice(0, 100), stored.slice(0, items.length));
    return items.length >= Math.min(20, stored.length);
  }, millis);
}

/** The page shows this message and all others that are stored, and its stream is live. */
export async function catchesUp(page, text, count = 1) {
  await isShownOnce(page, text, count);
  await shows(page, '#link', 'live');
  await hasNoGap(page);
}

/** Nothing is wider than the window. */
export async function fitsWindow(page) {
  const [content, window] = await page.evaluate(() =>
    [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert.ok(content <= window, `the page is ${content} wide in a window of ${window}`);
}

export async function fill(page, author, body) {
  await page.fill('#author', author);
  await page.fill('#body', body);
}

export async function send(page, body, author = 'browser test') {
  await fill(page, author, body);
  await page.click('#send');
}

export const setHidden = (page, hidden) => page.evaluate(value => {
  Object.defineProperty(document, 'hidden', { value, configurable: true });
  document.dispatchEvent(new Event('visibilitychange'));
}, hidden);

/** A laptop was closed for an hour: its clock has moved, and nothing else happened. */
export const sleepAnHour = page => page.evaluate(() => {
  const { now } = Date;
  Date.now = () => now() + 3_600_000;
});

/** @returns a list that grows: the path of each request from now on */
export function requestsOf(source) {
  const paths = [];
  source.on('request', request => paths.push(new URL(request.url()).pathname));
  return paths;
}

// ---- The service, and what stands between it and the browser

export async function getJson(path, options) {
  const headers = { Accept: 'application/json', ...options?.headers };
  const response = await fetch(BASE + path, { ...options, headers });
  assert.ok(response.ok, `${path}: ${response.status} ${await response.clone().text()}`);
  return response.json();
}

/** Stores a message without the page; retries until it is stored, as any client would. */
export async function store(body, author = 'browser test') {
  const key = `${RUN}-${Math.random()}`;
  for (let tries = 1; ; tries++) {
    try {
      return await getJson('/api/messages', { method: 'POST', body: JSON.stringify({ author, body }),
        headers: { 'Content-Type': 'application/json', 'Idempotency-Key': key } });
    } catch (error) {
      if (tries === 20) throw error;
      await new Promise(done => setTimeout(done, 250));
    }
  }
}

export async function storeMany(text, end, begin = 0) {
  for (let i = begin; i < end; i++) await store(`${text} ${i}`);
}

/** The stack behind an address that browsers trust as they trust https. It can hold event streams back. */
export async function relay() {
  const streams = new Set();
  let gate = Promise.resolve(), release;
  const server = createServer(async (request, response) => {
    const isStream = request.url.startsWith('/api/events');
    if (isStream) await gate;
    const onward = httpRequest(BASE + request.url, { method: request.method, headers: request.headers }, answer => {
      response.writeHead(answer.statusCode, answer.headers);
      answer.pipe(response);
      if (!isStream) return;
      const stream = { url: request.url, hold: () => answer.unpipe(response) };
      streams.add(stream);
      response.on('close', () => streams.delete(stream));
    });
    onward.on('error', () => response.destroy());
    response.on('close', () => onward.destroy());
    request.pipe(onward);
  });
  await new Promise(done => server.listen(0, '127.0.0.1', done));
  return {
    base: 'http://127.0.0.1:' + server.address().port,
    streams,
    /** Nothing comes through the streams that are open, nor do new ones open until `release`. */
    hold() {
      streams.forEach(stream => stream.hold());
      gate = new Promise(done => release = done);
    },
    release: () => release()
  };
}

const replies = createInterface({ input: process.stdin })[Symbol.asyncIterator]();

/** Lets ./run do it: "kill web2", "scale 6". */
export async function host(command) {
  console.log('@host ' + command);
  const { value } = await replies.next();
  assert.equal(value, 'ok', 'host: ' + command);
}

/** Runs the body while a part of the stack is killed; starts it in the end, whatever happens. */
export async function whileKilled(name, body) {
  try {
    await host('kill ' + name);
    await body();
  } finally {
    await host('start ' + name);
  }
}
