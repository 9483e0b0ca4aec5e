// Opens the page in Chromium and uses it as people do. ./run starts it beside the stack; by hand, against any
// address, but then without the cases that kill something:
//
//   npm ci && BASE_URL=http://localhost:9999 node page.mjs [WORDS OF A CASE'S NAME]
//
// Cases that need something killed or started write "@host kill web2" and wait for a line "ok": ./run answers.
// What the cases store stays: it is signed "browser test". The case that replaces all messages runs by ./restore, on a
// stack of its own.

/* global axe, stream, channel, showAnswer, showVisits, clearCells, drawCell -- of the page, for page.evaluate */
import assert from 'node:assert/strict';
import { mkdirSync, readFileSync } from 'node:fs';
import { createServer, request as httpRequest } from 'node:http';
import { createRequire } from 'node:module';
import { createInterface } from 'node:readline';
import { chromium } from 'playwright-core';

const BASE = process.env.BASE_URL ?? 'http://localhost:9999';
const OUT = process.env.OUT_DIR ?? new URL('out', import.meta.url).pathname;
const WITH_HOST = process.env.WITH_HOST === 'yes';
const ONLY = process.argv[2] ?? process.env.CASE ?? '';
const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const RUN = Date.now().toString(36);
const DESKTOP = { viewport: { width: 1366, height: 900 } };
const PHONE = { viewport: { width: 390, height: 844 } };
const WITHOUT_SCRIPT = { javaScriptEnabled: false };
const DARK = { colorScheme: 'dark' };

mkdirSync(OUT, { recursive: true });
const browser = await chromium.launch({
  executablePath: process.env.CHROMIUM ?? '/usr/bin/chromium',
  args: ['--no-sandbox', '--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking',
    '--disable-component-update', '--disable-sync', '--disable-dev-shm-usage']
});

// ---- cases: a name, and what has to hold

const cases = [];
const test = (name, body) => cases.push({ name, body });
const hostTest = (name, body) => cases.push({ name, body, needsHost: true });
const ownStackTest = (name, body) => process.env.OWN_STACK && cases.push({ name, body, needsHost: true });

let current, faults = []; // what the browser complained of, over all cases
let open = [];            // pages of the current case
let closing = [];         // what else it leaves

const newContext = async (options = {}) => {
  const context = await browser.newContext({ ...DESKTOP, locale: 'en-GB', ...options });
  context.setDefaultTimeout(15_000);
  return context;
};

/** Opens the page in a browser of its own; with a `context`, in another window of that browser. */
async function visit({ base = BASE, context, ...options } = {}, path = '/') {
  context ??= await newContext(options);
  const page = await context.newPage();
  open.push(page);
  page.streams = []; // who served the stream of events, one after the other
  page.on('response', response => {
    if (response.url().includes('/api/events')) page.streams.push(response.headers()['x-instance-id']);
  });
  page.on('console', message => message.type() === 'error' && complain(message.text()));
  page.on('pageerror', error => complain(String(error)));
  page.on('dialog', dialog => complain('a dialog: ' + dialog.message()) || dialog.dismiss());
  page.answer = await page.goto(base + path);
  if (options.javaScriptEnabled !== false) await says(page, '#link', 'live');
  return page;
}

/** What the network does is no fault of the page, in cases that break it on purpose. */
function complain(text) {
  if (!(current.mayFail && text.startsWith('Failed to load resource'))) faults.push(current.name + ': ' + text);
}

async function until(what, condition, millis = 20_000) {
  const end = Date.now() + millis;
  for (let last; ; await new Promise(done => setTimeout(done, 100))) {
    try {
      if (await condition()) return;
    } catch (error) {
      last = error;
    }
    if (Date.now() > end) {
      throw new Error(`expected within ${millis / 1000} s: ${what}` + (last ? ` (${last.message})` : ''));
    }
  }
}

async function says(page, selector, words, millis) {
  let seen;
  const saysSo = async () => (seen = await page.innerText(selector)).includes(words);
  await until(`${selector} says "${words}"`, saysSo, millis)
    .catch(error => { throw new Error(`${error.message}, saw "${seen}"`); });
}

async function saysNothing(page, selector) {
  await until(`${selector} says nothing`, async () => (await page.innerText(selector)).trim() === '');
}

async function getJson(path, options) {
  const headers = { Accept: 'application/json', ...options?.headers };
  const response = await fetch(BASE + path, { ...options, headers });
  assert.ok(response.ok, `${path}: ${response.status} ${await response.clone().text()}`);
  return response.json();
}

/** Stores a message past the page; repeated until it is answered, as any client would. */
async function store(body, author = 'browser test') {
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

const fill = async (page, author, body) => {
  await page.fill('#author', author);
  await page.fill('#body', body);
};
const message = (page, text) => page.locator('#messages > li').filter({ hasText: text });
const shown = page => page.$$eval('#messages > li', items => items.map(item => +item.dataset.id));
const lookAway = (page, hidden) => page.evaluate(value => {
  Object.defineProperty(document, 'hidden', { value, configurable: true });
  document.dispatchEvent(new Event('visibilitychange'));
}, hidden);
/** A laptop that was closed for an hour: its clock has moved, and nothing else happened. */
const sleepAnHour = page => page.evaluate(() => {
  const { now } = Date;
  Date.now = () => now() + 3_600_000;
});

async function isShownOnce(page, text) {
  await message(page, text).first().waitFor();
  assert.equal(await message(page, text).count(), 1, `"${text}" is shown once`);
}

/** What is stored is shown and nothing else, newest first, each once. */
async function hasNoGap(page, millis) {
  const path = '/api/messages' + (new URL(page.url()).search || '?limit=100');
  let items, stored;
  await until('the page shows what is stored', async () => {
    items = await page.$$eval('#messages > li', all =>
      all.map(item => item.dataset.id + ' ' + item.querySelector('.body').textContent));
    stored = (await getJson(path)).messages.map(one => one.id + ' ' + one.body);
    assert.deepEqual(items.slice(0, 100), stored.slice(0, items.length));
    return items.length >= Math.min(20, stored.length);
  }, millis);
}

/** The stack behind an address that browsers trust as they trust https. */
async function relay() {
  const streams = new Set();
  let open = Promise.resolve(), letOn;
  const server = createServer(async (request, response) => {
    const isStream = request.url.startsWith('/api/events');
    if (isStream) await open;
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
  closing.push(() => server.close());
  return {
    base: 'http://127.0.0.1:' + server.address().port,
    streams,
    /** Nothing comes through the streams that are open, nor do new ones open until `letOn`. */
    hold() {
      streams.forEach(stream => stream.hold());
      open = new Promise(done => letOn = done);
    },
    letOn: () => letOn()
  };
}

/** Nothing is wider than the window, and no message reaches out of the list. */
async function isWhole(page) {
  const [content, window] = await page.evaluate(() =>
    [document.documentElement.scrollWidth, document.documentElement.clientWidth]);
  assert.ok(content <= window, `the page is ${content} wide in a window of ${window}`);
}

async function host(command) {
  console.log('@host ' + command);
  const { value } = await answers.next();
  assert.equal(value, 'ok', 'host: ' + command);
}
const answers = WITH_HOST ? createInterface({ input: process.stdin })[Symbol.asyncIterator]() : null;

// ---- what is shown

test('says who answered, in the colour of its name, alike wherever the name is; without a script in none', async () => {
  const page = await visit();
  const instance = page.answer.headers()['x-instance-id'];
  assert.equal(await page.textContent('#instance'), instance);
  const hue = (page, selector) => page.locator(selector).first().evaluate(one => one.style.getPropertyValue('--hue'));
  assert.match(await hue(page, '#answer'), /^[0-9]+$/);
  assert.equal(await hue(page, `#shares > [data-name="${instance}"]`), await hue(page, '#answer'));
  const stored = await store(`colour ${RUN}`);
  await isShownOnce(page, `colour ${RUN}`);
  const name = `#messages > [data-id="${stored.id}"] .name`;
  assert.equal(await hue(page, name), await hue(await visit(), name), 'as it came by the stream, and in a new page');
  const plain = await visit(WITHOUT_SCRIPT);
  const [unpainted, accent] = await plain.locator(name).evaluate(one =>
    [getComputedStyle(one).color, getComputedStyle(document.querySelector('#send')).backgroundColor]);
  assert.equal(unpainted, accent, 'colour of a name without a script');
});

test('asks again without a reload, and counts the visit', async () => {
  const page = await visit();
  const before = await page.textContent('#visit');
  await page.click('#again');
  await until('another visit number', async () => await page.textContent('#visit') !== before);
  assert.ok(await page.textContent('#instance'));
});

test('a message sent in one window is seen in the other, once and without a reload', async () => {
  const [writer, reader] = [await visit(), await visit()];
  await fill(writer, 'browser test', `from one to the other ${RUN} 👋🏽`);
  await writer.click('#send');
  await says(writer, '#sent', 'Stored by ');
  await isShownOnce(reader, `from one to the other ${RUN} 👋🏽`);
  await isShownOnce(writer, `from one to the other ${RUN} 👋🏽`);
  assert.equal(await writer.inputValue('#body'), '', 'the form is ready for the next');
  assert.equal(await writer.inputValue('#author'), 'browser test', 'by the same author');
});

test('visits of others move the total and the bars', async () => {
  const page = await visit();
  const total = async () => Number((await page.textContent('#total')).replaceAll(',', ''));
  const before = await total();
  for (let i = 0; i < 9; i++) await getJson('/');
  await until('nine more visits', async () => await total() >= before + 9);
  const parts = await page.$$eval('#shares .count', counts => counts.map(one => +one.textContent.replaceAll(',', '')));
  assert.equal(parts.reduce((sum, one) => sum + one, 0), await total(), 'the parts add up to the total');
});

test('90 requests are drawn as they are answered, by at least three instances', async () => {
  const page = await visit();
  await page.click('#send90');
  await says(page, '#summary', 'All 90 answered');
  const cells = await page.$$eval('#cells > .own', all => all.map(one => one.style.getPropertyValue('--hue')));
  assert.equal(cells.filter(one => /^[0-9]+$/.test(one)).length, 90, 'coloured cells');
  assert.ok(new Set(cells).size >= 3, `colours: ${[...new Set(cells)]}`);
  const counts = await page.$$eval('#answers .count', all => all.map(one => +one.textContent));
  assert.equal(counts.reduce((sum, one) => sum + one, 0), 90, `counts: ${counts}`);
  assert.equal(await page.getAttribute('#cells', 'aria-label'), await page.textContent('#summary'), 'told in words');
});

test('older messages come on demand, in order, each once', async () => {
  for (let i = 0; i < 25; i++) await store(`older ${RUN} ${i}`);
  for (const options of [{}, WITHOUT_SCRIPT]) {
    const page = await visit(options);
    const before = await shown(page);
    assert.ok(before.length >= 20, `${before.length} are shown at first`);
    await page.click('#older');
    const isNext = async ids => ids.length > 0 && ids[0] < before.at(-1);
    if (options.javaScriptEnabled === false) await until('older ones', async () => isNext(await shown(page)));
    else await until('more', async () => (await shown(page)).length > before.length);
    const ids = await shown(page);
    assert.deepEqual(ids, [...new Set(ids)].sort((a, b) => b - a), 'newest first, each once');
  }
});

// ---- what people write

const HOSTILE = [
  '<script>alert(1)</script><img src=x onerror=alert(2)><svg onload=alert(3)>',
  '</p></li></ol></textarea></template></script><style>*{display:none}</style><!--',
  '&lt;b&gt; &amp;amp; "\' ${7*7} {{7*7}} %s %n \\u003cb\\u003e `',
  '\u202Eright to left override \u2067isolate \u202Dand never closed',
  'مرحبا بالعالم, mixed with English (and brackets)',
  'Z\u0311\u0310\u0343\u034B\u0367'.repeat(40),
  'unbroken'.repeat(250),
  '👩‍👩‍👧‍👦'.repeat(50),
  '😀'.repeat(2000),
  '\na\n\n\n\nb\r\nc\rd\te   f'
];

test('hostile text is shown as text, and breaks nothing', async () => {
  const live = await visit();
  const stored = [];
  for (const text of HOSTILE) stored.push(await store(text, [...text].slice(0, 40).join('')));
  const marker = await store(`after the hostile ${RUN}`);
  await isShownOnce(live, `after the hostile ${RUN}`);
  for (const page of [live, await visit(), await visit(PHONE), await visit({ ...WITHOUT_SCRIPT, ...PHONE })]) {
    for (const { id, author, body } of stored) {
      const item = page.locator(`#messages > li[data-id="${id}"]`);
      assert.equal(await item.locator('.body').textContent(), body);
      assert.equal(await item.locator('.author').textContent(), author);
      assert.equal(await item.locator('*').count(), 6, 'elements of a message');
    }
    await isWhole(page);
    const [list, widest] = await page.$eval('#messages', one =>
      [one.clientWidth, Math.max(...[...one.children].map(item => item.scrollWidth))]);
    assert.ok(widest <= list, `a message is ${widest} wide in a list of ${list}`);
  }
  assert.ok(marker.id > stored.at(-1).id);
  await live.screenshot({ path: `${OUT}/hostile.png`, fullPage: true });
});

test('a right-to-left override turns nothing around but its own text', async () => {
  await store('\u202Ebody', '\u202E\u2066author');
  for (const page of [await visit(), await visit(WITHOUT_SCRIPT)]) {
    const [first, last] = await page.locator('#messages > li').first().locator('.stored').evaluate(stored => {
      const place = (from, to) => {
        const range = document.createRange();
        range.setStart(stored.firstChild, from);
        range.setEnd(stored.firstChild, to);
        return range.getBoundingClientRect().left;
      };
      return [place(0, 1), place(5, 6)];
    });
    assert.ok(first < last, `"stored by" runs from ${first} to ${last}`);
  }
});

test('a refused form says why beside the field and keeps the text', async () => {
  current.mayFail = true; // Chromium logs each 422
  const page = await visit();
  await fill(page, 'x'.repeat(81), `kept ${RUN}`);
  await says(page, '#author-error', 'Too long by 1');
  await page.click('#send');
  await says(page, '#author-error', 'author has 81 characters, 80 are allowed');
  assert.equal(await page.getAttribute('#author', 'aria-invalid'), 'true');
  assert.ok((await page.getAttribute('#author', 'aria-describedby')).split(' ').includes('author-error'));
  assert.equal(await page.evaluate(() => document.activeElement.id), 'author', 'focus');
  assert.equal(await page.inputValue('#body'), `kept ${RUN}`);
  await fill(page, 'browser test', `kept ${RUN}`);
  assert.equal(await page.getAttribute('#author', 'aria-invalid'), null);
  await page.click('#send');
  await isShownOnce(page, `kept ${RUN}`);
});

test('a refused form keeps the text without JavaScript too', async () => {
  current.mayFail = true;
  const page = await visit(WITHOUT_SCRIPT);
  await fill(page, 'x'.repeat(81), `\n\nkept "${RUN}" <b>\n</textarea>`);
  await page.click('#send');
  await says(page, '#author-error', 'author has 81 characters, 80 are allowed');
  assert.equal(await page.inputValue('#body'), `\n\nkept "${RUN}" <b>\n</textarea>`);
  assert.equal(await page.inputValue('#author'), 'x'.repeat(81));
  assert.equal(await page.getAttribute('#author', 'aria-invalid'), 'true');
  assert.match(await page.title(), /Not stored/);
});

test('counts as the service does: Unicode code points', async () => {
  const page = await visit();
  await page.fill('#body', ' 👋🏽e\u0301 '); // a hand and its colour, e and its accent
  await says(page, '#body-limit', '4 of 2,000 characters');
  await page.fill('#body', '😀'.repeat(2000));
  await says(page, '#body-limit', '2,000 of 2,000 characters');
  assert.equal(await page.getAttribute('#body', 'aria-invalid'), null);
});

/** What Unicode calls White_Space, and what only others take for it: Java's strip, JavaScript's trim. */
const SPACES = '\t\v\f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a' +
  '\u2028\u2029\u202f\u205f\u3000';
const NO_SPACES = '\x1c\x1f\u180e\u200b\u2060\ufeff';

test('the page and the service take the same for white space around a text', async () => {
  const page = await visit();
  for (const space of SPACES + NO_SPACES) {
    const name = 'U+' + space.codePointAt(0).toString(16), counts = NO_SPACES.includes(space);
    await page.fill('#body', `${space}x${space}`);
    assert.equal(await page.textContent('#body-limit'), `${counts ? 3 : 1} of 2,000 characters`, name);
    const fields = { author: '', body: space + 'x'.repeat(2000) };
    for (const [type, body] of Object.entries({
      'application/json': JSON.stringify(fields),
      'application/x-www-form-urlencoded': String(new URLSearchParams(fields))
    })) {
      const answer = await fetch(BASE + '/api/messages', { method: 'POST', headers: { 'Content-Type': type }, body });
      const { errors } = await answer.json();
      const error = counts ? 'body has 2001 characters, 2000 are allowed' : undefined;
      assert.equal(errors.body, error, `${name} as ${type}`);
    }
  }
});

// ---- who uses it otherwise

test('works without JavaScript: reads, writes, says who answered, draws the bars', async () => {
  const page = await visit(WITHOUT_SCRIPT);
  assert.equal(await page.textContent('#instance'), page.answer.headers()['x-instance-id']);
  await fill(page, 'browser test', `no script ${RUN}`);
  await page.click('#send');
  await isShownOnce(page, `no script ${RUN}`);
  assert.equal(new URL(page.url()).pathname, '/');
  // Some, not all: an instance that was there for a moment has a share too small to see.
  const widths = await page.$$eval('#shares rect', bars => bars.map(bar => bar.getBoundingClientRect().width));
  assert.ok(widths.some(width => width > 20), `bars: ${widths}`);
  assert.equal(await page.locator('#try').isVisible(), false, 'no button that does nothing');
  await page.screenshot({ path: `${OUT}/no-javascript.png`, fullPage: true });
});

test('works with the keyboard alone, and shows where it is', async () => {
  const page = await visit();
  await page.keyboard.press('Tab');
  await page.keyboard.press('Enter'); // past everything, to the messages
  await page.keyboard.press('Tab');
  assert.equal(await page.evaluate(() => document.activeElement.id), 'author', 'after the skip link');
  await page.keyboard.type('browser test');
  await page.keyboard.press('Tab');
  await page.keyboard.type(`by keyboard ${RUN}`);
  await page.keyboard.press('Tab');
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  assert.equal(outline, 'solid', 'focus is seen');
  await page.keyboard.press('Enter');
  await isShownOnce(page, `by keyboard ${RUN}`);
  await page.keyboard.press('Shift+Tab');
  await page.keyboard.press('Shift+Tab');
  await page.keyboard.press('Shift+Tab');
  assert.equal(await page.evaluate(() => document.activeElement.id), 'send90', 'the button before the form');
  await page.keyboard.press('Space');
  await says(page, '#summary', 'All 90 answered');
});

test('stands still for those who ask for less motion', async () => {
  const page = await visit({ reducedMotion: 'reduce' });
  await store(`still ${RUN}`);
  await isShownOnce(page, `still ${RUN}`);
  const moving = await page.evaluate(() => [...document.querySelectorAll('*')].filter(one => {
    const style = getComputedStyle(one);
    return style.animationName !== 'none' || style.transitionProperty !== 'none' && style.transitionDuration !== '0s';
  }).length);
  assert.equal(moving, 0, 'elements that move');
});

test('axe finds no serious fault, in light and dark, wide and narrow, with errors and without', async () => {
  current.mayFail = true;
  for (const [name, options] of Object.entries({
    light: {}, dark: DARK, phone: PHONE, 'phone-dark': { ...PHONE, ...DARK }
  })) {
    const page = await visit(options);
    await judge(page, name);
    await page.click('#send90');
    await says(page, '#summary', 'All 90 answered');
    await page.waitForTimeout(500); // the bars come to rest
    await page.screenshot({ path: `${OUT}/${name}.png`, fullPage: true });
    await fill(page, '', '');
    await page.click('#send');
    await says(page, '#body-error', 'empty');
    await judge(page, name + ', refused');
  }
});

test('twenty instances have twenty colours, readable in light and dark', async () => {
  for (const options of [{}, DARK, { ...PHONE, ...DARK }]) {
    const page = await visit(options);
    const colours = await page.evaluate(() => {
      stream.close(); // what is shown from here on is made up
      const byInstance = Object.fromEntries(Array.from({ length: 20 }, (_, i) => ['web' + (i + 1), 1000 + i]));
      showVisits({ total: 20190, byInstance });
      clearCells();
      Object.keys(byInstance).forEach((name, i) => drawCell(document.getElementById('cells').children[i], name));
      showAnswer({ instance: 'a-long.host-name_of-64-letters-and-digits.0123456789abcdef01234567', visits: 123456789 });
      return [...document.querySelectorAll('#shares .bar rect')].map(bar => getComputedStyle(bar).fill);
    });
    assert.equal(new Set(colours).size, 20, `different colours of ${colours}`);
    await judge(page, 'twenty');
    await isWhole(page);
    const name = 'twenty' + (options.viewport ? '-phone' : '') + (options.colorScheme ? '-dark' : '');
    await page.screenshot({ path: `${OUT}/${name}.png` });
  }
});

async function judge(page, name) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ['violations'] }));
  const grave = violations.filter(one => ['serious', 'critical'].includes(one.impact));
  const where = one => one.nodes.slice(0, 3).map(node => node.html + ' ' + node.failureSummary).join('; ');
  assert.deepEqual(grave.map(one => `${one.id}: ${where(one)}`), [], `axe on ${name}`);
}

// ---- when something fails

test('an answer that got lost is asked for again with the same key: stored once', async () => {
  current.mayFail = true;
  const page = await visit();
  const keys = [];
  await page.route('**/api/messages', async route => {
    if (route.request().method() !== 'POST') return route.continue();
    keys.push(route.request().headers()['idempotency-key']);
    if (keys.length === 1) return route.abort('connectionreset');
    const answer = await route.fetch();
    if (keys.length === 2) return route.abort('connectionreset'); // stored, but nobody was told
    if (keys.length === 3) return route.fulfill({ status: 503, body: '{}' });
    return route.fulfill({ response: answer });
  });
  await fill(page, 'browser test', `lost answers ${RUN}`);
  await page.click('#send');
  await says(page, '#form-trouble', 'trying again');
  assert.equal(await page.inputValue('#body'), `lost answers ${RUN}`, 'the text is kept meanwhile');
  await says(page, '#sent', 'Stored by');
  assert.equal(keys.length, 4);
  assert.equal(new Set(keys).size, 1, `one key: ${keys}`);
  await page.reload();
  await isShownOnce(page, `lost answers ${RUN}`);
});

test('trying can be stopped and taken up again, under the same key', async () => {
  current.mayFail = true;
  const page = await visit();
  const keys = [];
  let broken = true;
  await page.route('**/api/messages', route => {
    if (route.request().method() !== 'POST') return route.continue();
    keys.push(route.request().headers()['idempotency-key']);
    return broken ? route.abort('connectionreset') : route.continue();
  });
  await fill(page, 'browser test', `stopped ${RUN}`);
  await page.click('#send');
  await page.click('#stop');
  await says(page, '#form-trouble', 'Send it again unchanged');
  assert.equal(await page.inputValue('#body'), `stopped ${RUN}`);
  broken = false;
  await page.click('#send');
  await isShownOnce(page, `stopped ${RUN}`);
  assert.equal(new Set(keys).size, 1, `one key: ${keys}`);
});

test('a tab that nobody looks at gives its connection back; the stream alone brings what it missed', async () => {
  const page = await visit();
  await lookAway(page, true);
  assert.equal(await page.evaluate(() => stream.readyState), 2, 'the stream is closed');
  for (let i = 0; i < 5; i++) await store(`while nobody looked ${RUN} ${i}`);
  const read = [];
  page.on('request', request => read.push(new URL(request.url()).pathname));
  await lookAway(page, false);
  await isShownOnce(page, `while nobody looked ${RUN} 4`);
  assert.equal(await message(page, `while nobody looked ${RUN} `).count(), 5);
  assert.ok(!read.includes('/api/messages'), `no page of messages is read: ${read}`);
  await hasNoGap(page);
});

test('where the stream left something out, the newest page is read, and no hole stays', async () => {
  const page = await visit();
  await page.evaluate(() => stream.close());
  for (let i = 0; i < 105; i++) await store(`left out ${RUN} ${i}`);
  await page.evaluate(() =>
    stream.dispatchEvent(new MessageEvent('gap', { data: '{"after":null}', lastEventId: '1-1' })));
  await isShownOnce(page, `left out ${RUN} 104`);
  await hasNoGap(page);
  await page.click('#older');
  await until('the older ones', async () => (await shown(page)).length > 100);
  const ids = await shown(page);
  const { messages } = await getJson(`/api/messages?limit=100&before=${ids[99]}`);
  assert.deepEqual(ids.slice(100), messages.slice(0, ids.length - 100).map(one => one.id), 'what follows');
});

// ---- a stream that has gone silent, and one stream for many windows

test('a stream that nothing comes from any more is replaced, and what it missed is shown', async () => {
  const way = await relay();
  const [page, healthy] = [await visit({ base: way.base }), await visit()];
  way.hold();
  await store(`while it was silent ${RUN}`);
  const began = Date.now();
  await says(page, '#link', 'reconnecting', 45_000);
  assert.ok(Date.now() - began > 20_000, 'two heartbeats had to be missing first');
  way.letOn();
  await isShownOnce(page, `while it was silent ${RUN}`);
  await says(page, '#link', 'live');
  assert.equal(way.streams.size, 1, 'streams open');
  assert.match([...way.streams][0].url, /[?]after=[0-9]+-[0-9]+$/, 'it goes on from where it was');
  await hasNoGap(page);
  await until('40 s have passed', () => Date.now() - began > 40_000, 45_000);
  assert.equal(healthy.streams.length, 1, 'a stream with heartbeats is left alone');
});

test('after a sleep, or on another network, it does not wait to find out', async () => {
  const way = await relay();
  const page = await visit({ base: way.base });
  for (const [what, happens] of Object.entries({
    sleep: () => sleepAnHour(page),
    network: () => page.evaluate(() => dispatchEvent(new Event('online'))),
    back: () => page.evaluate(() => dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true })))
  })) {
    way.hold();
    way.letOn(); // only new ones
    await store(`${what} ${RUN}`);
    await happens();
    await message(page, `${what} ${RUN}`).waitFor({ timeout: 3000 });
    await says(page, '#link', 'live');
    await hasNoGap(page);
  }
});

test('seven windows have one stream; whichever of them goes, the others miss nothing', async () => {
  const way = await relay(), context = await newContext(), windows = [];
  for (let i = 0; i < 7; i++) windows.push(await visit({ context, base: way.base }));
  const read = [];
  context.on('request', request => read.push(new URL(request.url()).pathname));
  const leader = async () => {
    const leads = await Promise.all(windows.map(page => page.evaluate(() => stream?.readyState === 1)));
    return windows[leads.indexOf(true)];
  };
  /** Stores while something happens; then all show it, by one stream. */
  const allGoOn = async (what, happens) => {
    const storing = (async () => { for (let i = 0; i < 20; i++) await store(`${what} ${RUN} ${i}`); })();
    await happens();
    await storing;
    for (const page of windows) {
      await isShownOnce(page, `${what} ${RUN} 19`);
      assert.equal(await message(page, `${what} ${RUN}`).count(), 20, what);
      await hasNoGap(page);
      await says(page, '#link', 'live');
    }
    await until('one stream', () => way.streams.size === 1, 3000);
  };
  await allGoOn('all seven', async () => {});
  const { total } = await getJson('/api/visits');
  for (const page of windows) await says(page, '#total', total.toLocaleString('en'));
  await allGoOn('it is closed', async () => {
    const closed = await leader();
    windows.splice(windows.indexOf(closed), 1);
    await closed.close();
  });
  await allGoOn('nobody looks at it', async () => lookAway(await leader(), true));
  assert.ok(!read.includes('/api/messages'), `no page of messages is read: ${read}`);
  for (const page of windows) await lookAway(page, true);
  await until('no stream', () => way.streams.size === 0, 3000);
  for (const page of windows) await lookAway(page, false);
  await allGoOn('they are looked at again', async () => {});
  const stuck = await leader();
  await stuck.evaluate(() => stream.close()); // and goes on holding the lead
  await allGoOn('it is stuck', () => sleepAnHour(windows.find(page => page !== stuck)));
  assert.notEqual(await leader(), stuck);
  const late = await visit({ context, base: way.base });
  windows.push(late);
  await until('a new window knows the instances', () => late.locator('#instances polyline[points*=","]').count(), 3000);
  await allGoOn('one more', async () => {});
});

test('a window that missed what another has told reads the newest page', async () => {
  const way = await relay(), context = await newContext();
  const [, page] = [await visit({ context, base: way.base }), await visit({ context, base: way.base })];
  await page.evaluate(() => {
    window.goOn = channel.onmessage;
    channel.onmessage = null;
  });
  for (let i = 0; i < 3; i++) await store(`missed ${RUN} ${i}`);
  await page.evaluate(() => { channel.onmessage = window.goOn; });
  await isShownOnce(page, `missed ${RUN} 2`);
  await hasNoGap(page);
});

test('where a browser has no locks, or refuses them, each window that is looked at has its own stream', async () => {
  for (const [what, without] of Object.entries({
    has: () => Object.defineProperty(Navigator.prototype, 'locks', { value: undefined }),
    refuses: () => { LockManager.prototype.request = async () => { throw new DOMException('no', 'SecurityError'); }; }
  })) {
    const way = await relay(), context = await newContext(), windows = [];
    await context.addInitScript(without);
    for (let i = 0; i < 3; i++) windows.push(await visit({ context, base: way.base }));
    assert.equal(way.streams.size, 3);
    await lookAway(windows[0], true);
    await until('its stream is closed', () => way.streams.size === 2, 3000);
    for (let i = 0; i < 3; i++) await store(`${what} no locks ${RUN} ${i}`);
    await lookAway(windows[0], false);
    for (const page of windows) {
      await isShownOnce(page, `${what} no locks ${RUN} 2`);
      await hasNoGap(page);
    }
  }
});

ownStackTest('after a restore all that is stored is shown, and nothing that is no more', async () => {
  const pages = [await visit()];
  for (let i = 0; i < 45; i++) await store(`one board ${i}`);
  await host('save one');
  await host('empty');
  for (const page of pages) await hasNoGap(page, 5000);
  for (let i = 0; i < 45; i++) await store(`another board ${i}`); // under the same ids
  await host('save another');
  await host('empty');
  await host('save none');
  for (const name of ['one', 'another', 'one', 'none', 'another', 'none', 'one']) {
    if (pages.length < 5) {
      pages.push(await visit());
      if (name === 'another') pages.push(await visit({}, `/?before=${(await shown(pages[0])).at(-1)}`)); // older ones
    }
    if (await pages[0].isVisible('#older')) await pages[0].click('#older');
    await host('load ' + name);
    for (const page of pages) await hasNoGap(page, 5000);
    const { total } = await getJson('/api/visits');
    for (const page of pages) await says(page, '#total', total.toLocaleString('en'), 5000);
    if (name !== 'another') await store(`after ${name}`);
    for (const page of pages) await hasNoGap(page, 5000);
  }
});

hostTest('the instance that serves the stream is killed: the page comes back and has no gap', async () => {
  current.mayFail = true;
  const page = await visit();
  const killed = page.streams.at(-1);
  try {
    for (let i = 0; i < 30; i++) {
      if (i === 10) await host('kill ' + killed);
      await store(`while ${killed} is away ${RUN} ${i}`);
    }
    await until('another instance serves the stream', () => page.streams.at(-1) !== killed && page.streams.length > 1);
    await says(page, '#link', 'live');
    await isShownOnce(page, `while ${killed} is away ${RUN} 29`);
    await hasNoGap(page);
    assert.equal(await message(page, `while ${killed} is away ${RUN} `).count(), 30);
  } finally {
    await host('start ' + killed);
  }
});

/** Waits for a state of an instance, and says how soon it was seen. */
async function becomes(page, name, states, millis) {
  const began = Date.now();
  const row = page.locator(`#instances > [data-name="${name}"]`);
  let seen;
  await until(`${name} is ${states}`, async () => {
    seen = await row.count() === 0 ? 'not there' : await row.locator('.state').innerText();
    return states.includes(seen.trim());
  }, millis).catch(error => { throw new Error(`${error.message}, saw "${seen}"`); });
  return Date.now() - began;
}

hostTest('in two windows who is killed is silent within 2 s, gone after 10, and back within 1', async () => {
  current.mayFail = true;
  const windows = [await visit(), await visit()];
  const served = windows[0].streams.at(-1); // the worst case for this window
  const timer = setInterval(() => fetch(BASE + '/healthz').catch(() => {}), 20);
  try {
    for (const page of windows) await becomes(page, served, ['ready'], 5000);
    await until('requests are drawn', async () => (await windows[0].innerText('#instances')).match(/[1-9][0-9]*\/s/));
    await host('kill ' + served);
    for (const page of windows) await becomes(page, served, ['silent'], 2500);
    await says(windows[1], '#instances-news', served + ' is silent');
    await windows[1].screenshot({ path: `${OUT}/silent.png` });
    for (const page of windows) await becomes(page, served, ['gone'], 11_000);
    assert.equal(await windows[0].locator('#instances > [data-state="ready"]').count() >= 2, true, 'others are ready');
    await host('start ' + served);
    for (const page of windows) await becomes(page, served, ['ready'], 1500);
    const points = await windows[0].getAttribute(`#instances > [data-name="${served}"] polyline`, 'points');
    assert.equal(points.split(' ').length, 60, 'a minute is drawn');
  } finally {
    clearInterval(timer);
    await host('start ' + served);
  }
});

hostTest('who is stopped is seen to drain, then to be gone', async () => {
  current.mayFail = true;
  const page = await visit();
  try {
    await becomes(page, 'web3', ['ready'], 5000);
    const stopped = host('stop web3');
    await becomes(page, 'web3', ['draining'], 3000);
    await stopped;
    await becomes(page, 'web3', ['gone'], 2000);
  } finally {
    await host('start web3');
  }
  await becomes(page, 'web3', ['ready'], 5000);
});

hostTest('three more instances are shown when they come; taken away they leave the list after a minute', async () => {
  current.mayFail = true;
  const page = await visit();
  const count = state => page.locator(`#instances > [data-state="${state}"]`).count();
  const before = await count('ready');
  try {
    await host(`scale ${before + 3}`);
    await until('all are ready', async () => await count('ready') === before + 3, 5000);
    for (let i = 0; i < 30; i++) await getJson('/');
  } finally {
    await host(`scale ${before}`);
  }
  await until('those that were', async () => await count('ready') === before, 5000);
  assert.equal(await count('gone'), 3);
  const rows = page.locator('#instances > li');
  await until('none is left that is gone', async () => await rows.count() === before, 65_000);
  await until('their visits are one number', async () =>
    await page.$$eval('#shares > li', rows => rows.map(row => row.dataset.name)
      .every(name => /^web[123]$|^earlier instances$/.test(name))), 15_000);
});

hostTest('PostgreSQL away is said in words; what was typed waits and is stored once it is back', async () => {
  current.mayFail = true;
  const [page, plain] = [await visit(), await visit(WITHOUT_SCRIPT)];
  let fresh;
  try {
    await host('kill postgres');
    await says(page, '#trouble', 'PostgreSQL is away: messages can be neither read nor stored');
    await fill(page, 'browser test', `waited for PostgreSQL ${RUN}`);
    await page.click('#send');
    await says(page, '#form-trouble', 'trying again');
    await page.screenshot({ path: `${OUT}/away.png` });
    await fill(plain, 'browser test', `kept for PostgreSQL ${RUN}`);
    await plain.click('#send');
    await says(plain, '#form-trouble', 'Not stored: PostgreSQL is away');
    await says(plain, '#trouble', 'PostgreSQL is away');
    assert.equal(await plain.inputValue('#body'), `kept for PostgreSQL ${RUN}`);
    fresh = await visit();
    assert.deepEqual(await shown(fresh), [], 'messages in a page made without PostgreSQL');
  } finally {
    await host('start postgres');
  }
  await says(page, '#sent', 'Stored by');
  await saysNothing(page, '#trouble');
  for (const one of [page, fresh]) {
    await isShownOnce(one, `waited for PostgreSQL ${RUN}`);
    await hasNoGap(one);
  }
});

hostTest('Redis away is said in words; messages go on, and viewers catch up when it is back', async () => {
  current.mayFail = true;
  const [writer, reader] = [await visit(), await visit()];
  try {
    await host('kill redis');
    await says(reader, '#trouble', 'Redis is away: visits are not counted');
    await becomes(reader, 'web1', ['unknown'], 3000);
    await fill(writer, 'browser test', `without Redis ${RUN}`);
    await writer.click('#send');
    await says(writer, '#sent', 'Stored by');
    const fresh = await visit();
    assert.equal(await fresh.textContent('#visit'), 'Not counted as a visit');
    await says(fresh, '#trouble', 'Redis is away');
  } finally {
    await host('start redis');
  }
  await saysNothing(reader, '#trouble');
  await becomes(reader, 'web1', ['ready'], 3000);
  await isShownOnce(reader, `without Redis ${RUN}`);
  await hasNoGap(reader);
});

test('no error on the console, no breach of the content security policy, in all of it', async () => {
  assert.deepEqual(faults, []);
  const policy = (await fetch(BASE + '/', { headers: { Accept: 'text/html' } })).headers.get('content-security-policy');
  for (const rule of ["default-src 'none'", "connect-src 'self'", "form-action 'self'", "frame-ancestors 'none'"])
    assert.ok(policy.includes(rule), `${rule} in ${policy}`);
  assert.ok(!policy.includes('unsafe'), policy);
});

// ---- the pictures of README.md: one story in three frames. `make pictures`, on a stack of its own.

const STORY = [
  ['Grace', 'Which of the three stored this? It says so on the right.'],
  ['Edsger', 'I sent this one twice with the same Idempotency-Key. It is here once.'],
  ['Barbara', 'Kill one of them and go on writing: nothing is lost, and nobody is refused.'],
  ['Leslie', 'All three give the same answer, in the same order.']
];

if (process.env.STORY) hostTest('a story in three pictures', async () => {
  current.mayFail = true;
  for (const [author, body] of STORY) await store(body, author);
  const pages = { light: await visit({}), dark: await visit(DARK) };
  const frame = async name => {
    for (const [scheme, page] of Object.entries(pages))
      await page.screenshot({ path: `${OUT}/${name}-${scheme}.png` });
  };
  let asking = true;
  const asker = async () => { while (asking) await getJson('/').catch(() => {}); };
  const askers = [asker(), asker()];
  const seconds = count => new Promise(done => setTimeout(done, count * 1000));
  await seconds(30);
  await frame('story-1');
  await host('kill web2');
  await store('web2 was killed a few seconds ago. Did you notice?', 'Margaret');
  for (const page of Object.values(pages)) await becomes(page, 'web2', ['gone'], 12_000);
  await frame('story-2');
  await host('start web2');
  await seconds(12);
  await store('And web2 is back.', 'Ada');
  for (const page of Object.values(pages)) await isShownOnce(page, 'And web2 is back.');
  await seconds(3); // what is new is marked for two
  await frame('story-3');
  asking = false;
  await Promise.all(askers);
});

// ---- run

const tooLong = seconds => new Promise((_, fail) =>
  setTimeout(() => fail(new Error(`expected an end within ${seconds} s`)), seconds * 1000).unref());

let passed = 0, failed = 0, skipped = 0;
for (current of cases.filter(one => one.name.toLowerCase().includes(ONLY.toLowerCase()))) {
  if (current.needsHost && !WITH_HOST) {
    console.log(`  skip  ${current.name} (needs tests/browser/run)`);
    skipped++;
    continue;
  }
  const began = Date.now();
  try {
    await Promise.race([current.body(), tooLong(180)]);
    passed++;
    console.log(`  ok    ${current.name} (${Date.now() - began} ms)`);
  } catch (error) {
    failed++;
    console.log(`  FAIL  ${current.name}\n${String(error.stack).slice(0, 2500).replace(/^/gm, '        ')}`);
    for (const [i, page] of open.entries())
      await page.screenshot({ path: `${OUT}/failed-${failed}-${i}.png`, fullPage: true }).catch(() => {});
  }
  for (const page of open) await page.context().close();
  for (const close of closing) close();
  open = [];
  closing = [];
}
await browser.close();
console.log(`screenshots are in ${process.env.OUT_SHOWN ?? OUT}`);
console.log(`${passed} passed, ${failed} failed` + (skipped ? `, ${skipped} skipped` : ''));
process.exit(failed === 0 && passed > 0 ? 0 : 1);
