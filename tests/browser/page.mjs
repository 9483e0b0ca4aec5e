// Opens the page in Chromium and uses it as people do. ./run starts it beside the stack, and kills and starts what the
// cases want. What they store stays: it is signed "browser test".

/* global axe, stream, channel, showAnswer, showVisits, drawCell -- of the page, for page.evaluate */
import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import {
  BASE, MAY_FAIL, OUT, RUN, becomes, catchesUp, faults, fill, fitsWindow, getJson, hasNoGap, host, isShownOnce,
  messages, newContext, relay, requestsOf, runCases, send, setHidden, shownIds, shows, sleepAnHour, store, storeMany,
  test, until, visit, whileKilled
} from './harness.mjs';

const AXE = readFileSync(createRequire(import.meta.url).resolve('axe-core/axe.min.js'), 'utf8');
const PHONE = { viewport: { width: 390, height: 844 } };
const DARK = { colorScheme: 'dark' };
const WITHOUT_SCRIPT = { javaScriptEnabled: false };

const isHue = text => /^[0-9]+$/.test(text);
const sum = numbers => numbers.reduce((total, one) => total + one, 0);
const numbersIn = (page, selector) =>
  page.$$eval(selector, all => all.map(one => Number(one.textContent.replaceAll(',', ''))));

// ---- What the page shows

test('shows who answered, in one colour wherever the name is; all names have one colour without a script', async () => {
  const page = await visit();
  const instance = page.answer.headers()['x-instance-id'];
  assert.equal(await page.textContent('#instance'), instance);
  const hue = (page, selector) => page.locator(selector).first().evaluate(one => one.style.getPropertyValue('--hue'));
  assert.ok(isHue(await hue(page, '#answer')));
  assert.equal(await hue(page, `#shares > [data-name="${instance}"]`), await hue(page, '#answer'));
  const stored = await store(`colour ${RUN}`);
  await isShownOnce(page, `colour ${RUN}`);
  const name = `#messages > [data-id="${stored.id}"] .name`;
  assert.equal(await hue(page, name), await hue(await visit(), name), 'by the stream, and in a new page');
  const plain = await visit(WITHOUT_SCRIPT);
  const [unpainted, accent] = await plain.locator(name).evaluate(one =>
    [getComputedStyle(one).color, getComputedStyle(document.querySelector('#send')).backgroundColor]);
  assert.equal(unpainted, accent, 'colour of a name without a script');
});

test('sends another request without a reload, and counts the visit', async () => {
  const page = await visit();
  const before = await page.textContent('#visit');
  await page.click('#again');
  await until('another visit number', async () => await page.textContent('#visit') !== before);
  assert.ok(await page.textContent('#instance'));
});

test('a message sent in one window appears in the other, once and without a reload', async () => {
  const [writer, reader] = [await visit(), await visit()];
  const text = `from one to the other ${RUN} 👋🏽`;
  await send(writer, text);
  await shows(writer, '#sent', 'Stored by ');
  await isShownOnce(reader, text);
  await isShownOnce(writer, text);
  assert.equal(await writer.inputValue('#body'), '', 'the form is ready for the next');
  assert.equal(await writer.inputValue('#author'), 'browser test', 'by the same author');
});

test('visits of others move the total and the bars', async () => {
  const page = await visit();
  const total = async () => (await numbersIn(page, '#total'))[0];
  const before = await total();
  for (let i = 0; i < 9; i++) await getJson('/');
  await until('nine more visits', async () => await total() >= before + 9);
  assert.equal(sum(await numbersIn(page, '#shares .count')), await total(), 'the parts add up to the total');
});

test('90 requests are drawn as they are answered, by at least three instances', async () => {
  const page = await visit();
  await page.click('#send90');
  await shows(page, '#summary', 'All 90 answered');
  const cells = await page.$$eval('#cells > .own', all => all.map(one => one.style.getPropertyValue('--hue')));
  assert.equal(cells.filter(isHue).length, 90, 'coloured cells');
  assert.ok(new Set(cells).size >= 3, `colours: ${[...new Set(cells)]}`);
  assert.equal(sum(await numbersIn(page, '#answers .count')), 90, 'counts');
  const names = await page.$$eval('#answers > li', rows => rows.map(row => row.dataset.name));
  await shows(page, '#summary', new RegExp('time: ' + names.map(name => name + ' [0-9.]+ ms').join(', ') + '$'));
  assert.equal(await page.getAttribute('#cells', 'aria-label'), await page.textContent('#summary'), 'in words');
});

test('older messages come on demand, in order, each once', async () => {
  await storeMany(`older ${RUN}`, 25);
  for (const options of [{}, WITHOUT_SCRIPT]) {
    const page = await visit(options);
    const before = await shownIds(page);
    assert.ok(before.length >= 20, `${before.length} are shown at first`);
    await page.click('#older');
    await until('older ones', async () => {
      const ids = await shownIds(page);
      return options === WITHOUT_SCRIPT ? ids.length > 0 && ids[0] < before.at(-1) : ids.length > before.length;
    });
    const ids = await shownIds(page);
    assert.deepEqual(ids, [...new Set(ids)].sort((a, b) => b - a), 'newest first, each once');
  }
});

// ---- What people write

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
    await fitsWindow(page);
    const [list, widest] = await page.$eval('#messages', one =>
      [one.clientWidth, Math.max(...[...one.children].map(item => item.scrollWidth))]);
    assert.ok(widest <= list, `a message is ${widest} wide in a list of ${list}`);
  }
  assert.ok(marker.id > stored.at(-1).id);
  await live.screenshot({ path: `${OUT}/hostile.png`, fullPage: true });
});

test('a right-to-left override turns only its own text around', async () => {
  await store('\u202Ebody', '\u202E\u2066author');
  for (const page of [await visit(), await visit(WITHOUT_SCRIPT)]) {
    const [first, last] = await page.locator('#messages > li').first().locator('.stored').evaluate(stored =>
      [0, 5].map(at => {
        const range = document.createRange();
        range.setStart(stored.firstChild, at);
        range.setEnd(stored.firstChild, at + 1);
        return range.getBoundingClientRect().left;
      }));
    assert.ok(first < last, `"stored by" runs from ${first} to ${last}`);
  }
});

test('a rejected form shows the reason beside the field, keeps the text, and can be mended', MAY_FAIL, async () => {
  for (const options of [{}, WITHOUT_SCRIPT]) {
    const page = await visit(options);
    const author = 'x'.repeat(81), body = `\n\nkept "${RUN}" <b>\n</textarea>`, hasScript = options !== WITHOUT_SCRIPT;
    await fill(page, author, body);
    if (hasScript) await shows(page, '#author-error', 'Too long by 1');
    await page.click('#send');
    await shows(page, '#author-error', 'author has 81 characters, 80 are allowed');
    assert.equal(await page.inputValue('#author'), author);
    assert.equal(await page.inputValue('#body'), body);
    assert.equal(await page.getAttribute('#author', 'aria-invalid'), 'true');
    assert.ok((await page.getAttribute('#author', 'aria-describedby')).split(' ').includes('author-error'));
    assert.equal(await page.evaluate(() => document.activeElement.id), 'author', 'focus');
    if (!hasScript) assert.match(await page.title(), /Not stored/);
    await fill(page, 'browser test', `kept ${RUN} ${hasScript}`);
    if (hasScript) assert.equal(await page.getAttribute('#author', 'aria-invalid'), null);
    await page.click('#send');
    await isShownOnce(page, `kept ${RUN} ${hasScript}`);
  }
});

/** What Unicode calls White_Space, and what only others take for it: Java's strip, JavaScript's trim. */
const SPACES = '\t\v\f \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a' +
  '\u2028\u2029\u202f\u205f\u3000';
const NO_SPACES = '\x1c\x1f\u180e\u200b\u2060\ufeff';

test('the page and the service count alike: code points, without the white space around a text', async () => {
  const page = await visit();
  await page.fill('#body', ' 👋🏽e\u0301 '); // a hand and its colour, e and its accent
  await shows(page, '#body-limit', '4 of 2,000 characters');
  await page.fill('#body', '😀'.repeat(2000));
  await shows(page, '#body-limit', '2,000 of 2,000 characters');
  assert.equal(await page.getAttribute('#body', 'aria-invalid'), null);
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

// ---- Other ways to use it

test('works without JavaScript: reads, writes, shows who answered, draws the bars', async () => {
  const page = await visit(WITHOUT_SCRIPT);
  assert.equal(await page.textContent('#instance'), page.answer.headers()['x-instance-id']);
  await send(page, `no script ${RUN}`);
  await isShownOnce(page, `no script ${RUN}`);
  assert.equal(new URL(page.url()).pathname, '/');
  // Some, not all: an instance that was there for a moment has a share too small to see.
  const widths = await page.$$eval('#shares rect', bars => bars.map(bar => bar.getBoundingClientRect().width));
  assert.ok(widths.some(width => width > 20), `bars: ${widths}`);
  assert.equal(await page.locator('#try').isVisible(), false, 'no button that does nothing');
  await page.screenshot({ path: `${OUT}/no-javascript.png`, fullPage: true });
});

test('works with the keyboard alone, and shows the focus', async () => {
  const page = await visit();
  const press = async (...keys) => { for (const key of keys) await page.keyboard.press(key); };
  const focus = () => page.evaluate(() => document.activeElement.id);
  await press('Tab', 'Enter', 'Tab'); // past everything, to the messages
  assert.equal(await focus(), 'author', 'after the skip link');
  await page.keyboard.type('browser test');
  await press('Tab');
  await page.keyboard.type(`by keyboard ${RUN}`);
  await press('Tab');
  const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  assert.equal(outline, 'solid', 'focus is seen');
  await press('Enter');
  await isShownOnce(page, `by keyboard ${RUN}`);
  await press('Shift+Tab', 'Shift+Tab', 'Shift+Tab');
  assert.equal(await focus(), 'send90', 'the button before the form');
  await press('Space');
  await shows(page, '#summary', 'All 90 answered');
});

test('stands still for readers who prefer reduced motion', async () => {
  const page = await visit({ reducedMotion: 'reduce' });
  await store(`still ${RUN}`);
  await isShownOnce(page, `still ${RUN}`);
  const moving = await page.evaluate(() => [...document.querySelectorAll('*')].filter(one => {
    const style = getComputedStyle(one);
    return style.animationName !== 'none' || style.transitionProperty !== 'none' && style.transitionDuration !== '0s';
  }).length);
  assert.equal(moving, 0, 'elements that move');
});

async function checkAccessibility(page, name) {
  await page.evaluate(AXE);
  const { violations } = await page.evaluate(() => axe.run(document, { resultTypes: ['violations'] }));
  const grave = violations.filter(one => ['serious', 'critical'].includes(one.impact));
  const where = one => one.nodes.slice(0, 3).map(node => node.html + ' ' + node.failureSummary).join('; ');
  assert.deepEqual(grave.map(one => `${one.id}: ${where(one)}`), [], `axe on ${name}`);
}

test('axe finds no serious fault in light and dark, on phones, with errors, with 20 colours', MAY_FAIL, async () => {
  for (const [name, options] of Object.entries({
    light: {}, dark: DARK, phone: PHONE, 'phone-dark': { ...PHONE, ...DARK }
  })) {
    const page = await visit(options);
    await checkAccessibility(page, name);
    await page.click('#send90');
    await shows(page, '#summary', 'All 90 answered');
    await page.waitForTimeout(500); // the bars come to rest
    await page.screenshot({ path: `${OUT}/${name}.png`, fullPage: true });
    await send(page, '', '');
    await shows(page, '#body-error', 'empty');
    await checkAccessibility(page, name + ', rejected');
    const colours = await page.evaluate(() => {
      stream.close(); // what is shown from here on is made up
      const byInstance = Object.fromEntries(Array.from({ length: 20 }, (_, i) => ['web' + (i + 1), 1000 + i]));
      showVisits({ total: 20190, byInstance });
      Object.keys(byInstance).forEach(drawCell);
      showAnswer({ instance: 'a-long.host-name_of-64-letters-and-digits.0123456789abcdef01234567', visits: 123456789 });
      return [...document.querySelectorAll('#shares .bar rect')].map(bar => getComputedStyle(bar).fill);
    });
    assert.equal(new Set(colours).size, 20, `different colours of ${colours}`);
    await checkAccessibility(page, name + ', twenty instances');
    await fitsWindow(page);
    await page.screenshot({ path: `${OUT}/twenty-${name}.png` });
  }
});

// ---- Failures between the page and the service

/** @returns the idempotency keys of all posts; `answer` decides what becomes of each */
async function interceptPosts(page, answer) {
  const keys = [];
  await page.route('**/api/messages', route => {
    if (route.request().method() !== 'POST') return route.continue();
    keys.push(route.request().headers()['idempotency-key']);
    return answer(route, keys.length);
  });
  return keys;
}

test('after a lost response the page retries with the same key: stored once', MAY_FAIL, async () => {
  const page = await visit(), text = `lost answers ${RUN}`;
  const keys = await interceptPosts(page, async (route, tries) => {
    if (tries === 1) return route.abort('connectionreset');
    const response = await route.fetch();
    if (tries === 2) return route.abort('connectionreset'); // stored, but the response is lost
    return route.fulfill(tries === 3 ? { status: 503, body: '{}' } : { response });
  });
  await send(page, text);
  await shows(page, '#form-trouble', 'trying again');
  assert.equal(await page.inputValue('#body'), text, 'the text is kept meanwhile');
  await shows(page, '#sent', 'Stored by');
  assert.equal(keys.length, 4);
  assert.equal(new Set(keys).size, 1, `one key: ${keys}`);
  await page.reload();
  await isShownOnce(page, text);
});

test('retries can be stopped and taken up again, with the same key', MAY_FAIL, async () => {
  const page = await visit(), text = `stopped ${RUN}`;
  let broken = true;
  const keys = await interceptPosts(page, route => broken ? route.abort('connectionreset') : route.continue());
  await send(page, text);
  await page.click('#stop');
  await shows(page, '#form-trouble', 'Send it again unchanged');
  assert.equal(await page.inputValue('#body'), text);
  broken = false;
  await page.click('#send');
  await isShownOnce(page, text);
  assert.equal(new Set(keys).size, 1, `one key: ${keys}`);
});

test('a hidden tab gives its connection back; the stream alone brings what it missed', async () => {
  const page = await visit(), text = `while hidden ${RUN}`;
  await setHidden(page, true);
  assert.equal(await page.evaluate(() => stream.readyState), 2, 'the stream is closed');
  await storeMany(text, 5);
  const read = requestsOf(page);
  await setHidden(page, false);
  await isShownOnce(page, `${text} 4`);
  await isShownOnce(page, text, 5);
  assert.ok(!read.includes('/api/messages'), `no page of messages is read: ${read}`);
  await hasNoGap(page);
});

test('after a gap event the page reads the newest messages, and no hole stays', async () => {
  const page = await visit();
  await page.evaluate(() => stream.close());
  await storeMany(`left out ${RUN}`, 105);
  await page.evaluate(() =>
    stream.dispatchEvent(new MessageEvent('gap', { data: '{"after":null}', lastEventId: '1-1' })));
  await isShownOnce(page, `left out ${RUN} 104`);
  await hasNoGap(page);
  await page.click('#older');
  await until('the older ones', async () => (await shownIds(page)).length > 100);
  const ids = await shownIds(page);
  const older = (await getJson(`/api/messages?limit=100&before=${ids[99]}`)).messages.map(one => one.id);
  assert.deepEqual(ids.slice(100), older.slice(0, ids.length - 100), 'what follows');
});

// ---- A silent stream, and one stream for many windows

test('a stream without heartbeats is replaced, and what it missed is shown', async () => {
  const proxy = await relay();
  const [page, healthy] = [await visit({ base: proxy.base }), await visit()];
  proxy.hold();
  await store(`while it was silent ${RUN}`);
  const began = Date.now();
  await shows(page, '#link', 'reconnecting', 45_000);
  assert.ok(Date.now() - began > 20_000, 'two heartbeats had to be missing first');
  proxy.release();
  await catchesUp(page, `while it was silent ${RUN}`);
  assert.equal(proxy.streams.size, 1, 'streams open');
  assert.match([...proxy.streams][0].url, /[?]after=[0-9]+-[0-9]+$/, 'it continues from its cursor');
  await until('40 s have passed', () => Date.now() - began > 40_000, 45_000);
  assert.equal(healthy.streams.length, 1, 'a stream with heartbeats is left alone');
});

test('after a sleep, or on another network, the page reconnects at once', async () => {
  const proxy = await relay();
  const page = await visit({ base: proxy.base });
  for (const [what, happens] of Object.entries({
    sleep: () => sleepAnHour(page),
    network: () => page.evaluate(() => dispatchEvent(new Event('online'))),
    back: () => page.evaluate(() => dispatchEvent(new PageTransitionEvent('pageshow', { persisted: true })))
  })) {
    proxy.hold();
    proxy.release(); // new streams only
    await store(`${what} ${RUN}`);
    await happens();
    await messages(page, `${what} ${RUN}`).waitFor({ timeout: 3000 });
    await catchesUp(page, `${what} ${RUN}`);
  }
});

/** @returns so many windows of one browser, behind a relay */
async function openWindows(count, script) {
  const proxy = await relay(), context = await newContext(), windows = [];
  if (script) await context.addInitScript(script);
  const add = async () => windows.push(await visit({ context, base: proxy.base }));
  for (let i = 0; i < count; i++) await add();
  return { proxy, context, windows, add };
}

test('seven windows have one stream; whichever of them goes, the others miss nothing', async () => {
  const { proxy, context, windows, add } = await openWindows(7);
  const read = requestsOf(context);
  const leader = async () => {
    const leads = await Promise.all(windows.map(page => page.evaluate(() => stream?.readyState === 1)));
    return windows[leads.indexOf(true)];
  };
  /** Stores while something happens; then all show it, by one stream. */
  const allGoOn = async (what, happens = () => {}) => {
    const storing = storeMany(`${what} ${RUN}`, 20);
    await happens();
    await storing;
    for (const page of windows) {
      await isShownOnce(page, `${what} ${RUN} 19`);
      await catchesUp(page, `${what} ${RUN}`, 20);
    }
    await until('one stream', () => proxy.streams.size === 1, 3000);
  };
  await allGoOn('all seven');
  const { total } = await getJson('/api/visits');
  for (const page of windows) await shows(page, '#total', total.toLocaleString('en'));
  await allGoOn('it is closed', async () => {
    const closed = await leader();
    windows.splice(windows.indexOf(closed), 1);
    await closed.close();
  });
  await allGoOn('it is hidden', async () => setHidden(await leader(), true));
  assert.ok(!read.includes('/api/messages'), `no page of messages is read: ${read}`);
  for (const page of windows) await setHidden(page, true);
  await until('no stream', () => proxy.streams.size === 0, 3000);
  for (const page of windows) await setHidden(page, false);
  await allGoOn('they are visible again');
  const stuck = await leader();
  await stuck.evaluate(() => stream.close()); // and goes on holding the lead
  await allGoOn('it is stuck', () => sleepAnHour(windows.find(page => page !== stuck)));
  assert.notEqual(await leader(), stuck);
  await add();
  const drawn = windows.at(-1).locator('#instances polyline[points*=","]');
  await until('a new window knows the instances', () => drawn.count(), 3000);
  await allGoOn('one more');
});

test('over HTTP/2, seven windows of which each has its own stream', async () => {
  const context = await newContext({ ignoreHTTPSErrors: true }), protocols = new Set(), windows = [];
  await context.addInitScript(() => Object.defineProperty(Navigator.prototype, 'locks', { value: undefined }));
  for (let i = 0; i < 7; i++) windows.push(await visit({ context, base: process.env.HTTPS_URL }));
  for (const page of windows) {
    assert.equal(page.streams.length, 1); // over HTTP/1.1, a browser has six connections to a host
    const entries = () => [...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')];
    for (const { nextHopProtocol } of await page.evaluate(`(${entries})().map(entry => entry.toJSON())`))
      protocols.add(nextHopProtocol);
  }
  assert.deepEqual([...protocols], ['h2']);
  await storeMany(`HTTP/2 ${RUN}`, 20);
  for (const page of windows) {
    await isShownOnce(page, `HTTP/2 ${RUN} 19`);
    await catchesUp(page, `HTTP/2 ${RUN}`, 20);
  }
});

test('a window that missed a broadcast event reads the newest page', async () => {
  const { windows: [, page] } = await openWindows(2);
  await page.evaluate(() => {
    window.receiver = channel.onmessage;
    channel.onmessage = null;
  });
  await storeMany(`missed ${RUN}`, 3);
  await page.evaluate(() => { channel.onmessage = window.receiver; });
  await catchesUp(page, `missed ${RUN} 2`);
});

test('where a browser has no locks, or refuses them, each visible window has its own stream', async () => {
  for (const [what, script] of Object.entries({
    has: () => Object.defineProperty(Navigator.prototype, 'locks', { value: undefined }),
    refuses: () => { LockManager.prototype.request = async () => { throw new DOMException('no', 'SecurityError'); }; }
  })) {
    const { proxy, windows } = await openWindows(3, script);
    assert.equal(proxy.streams.size, 3);
    await setHidden(windows[0], true);
    await until('its stream is closed', () => proxy.streams.size === 2, 3000);
    await storeMany(`${what} no locks ${RUN}`, 3);
    await setHidden(windows[0], false);
    for (const page of windows) await catchesUp(page, `${what} no locks ${RUN} 2`);
  }
});

// ---- Parts of the stack are killed

if (process.env.OWN_STACK) test('after a restore the page shows all that is stored, and nothing else', async () => {
  const pages = [await visit()];
  const noneHasAGap = async () => { for (const page of pages) await hasNoGap(page, 5000); };
  await storeMany('one board', 45);
  await host('save one');
  await host('empty');
  await noneHasAGap();
  await storeMany('another board', 45); // under the same ids
  await host('save another');
  await host('empty');
  await host('save none');
  for (const name of ['one', 'another', 'one', 'none', 'another', 'none', 'one']) {
    if (pages.length < 5) {
      pages.push(await visit());
      if (name === 'another') pages.push(await visit({}, `/?before=${(await shownIds(pages[0])).at(-1)}`));
    }
    if (await pages[0].isVisible('#older')) await pages[0].click('#older');
    await host('load ' + name);
    await noneHasAGap();
    for (const page of pages)
      await until('the page shows the total', async () => {
        const [shown, stored] = [await page.innerText('#total'), await getJson('/api/visits')];
        return shown.trim() === stored.total.toLocaleString('en')
          || assert.fail(`${shown}, but ${JSON.stringify(stored)} is stored; ${name}, page ${pages.indexOf(page)}`);
      }, 5000);
    if (name !== 'another') await store(`after ${name}`);
    await noneHasAGap();
  }
});

test('the instance that serves the stream is killed: the page reconnects and has no gap', MAY_FAIL, async () => {
  const page = await visit();
  const killed = page.streams.at(-1), text = `without ${killed} ${RUN}`;
  await storeMany(text, 10);
  await whileKilled(killed, async () => {
    await storeMany(text, 30, 10);
    await until('another instance serves the stream', () => page.streams.at(-1) !== killed && page.streams.length > 1);
    await isShownOnce(page, `${text} 29`);
    await catchesUp(page, `${text} `, 30);
  });
});

test('in two windows, a killed instance is silent in 2 s, gone in 10, ready again in 1', MAY_FAIL, async () => {
  const windows = [await visit(), await visit()];
  const served = windows[0].streams.at(-1); // the worst case for this window
  const allSee = async (state, millis) => { for (const page of windows) await becomes(page, served, state, millis); };
  const timer = setInterval(() => fetch(BASE + '/healthz').catch(() => {}), 20);
  try {
    await allSee('ready', 5000);
    await shows(windows[0], '#instances', /[1-9][0-9]*\/s/);
    await whileKilled(served, async () => {
      await allSee('silent', 2500);
      await shows(windows[1], '#instances-news', served + ' is silent');
      await windows[1].screenshot({ path: `${OUT}/silent.png` });
      await allSee('gone', 11_000);
      assert.ok(await windows[0].locator('#instances > [data-state="ready"]').count() >= 2, 'others are ready');
      await host('start ' + served);
      await allSee('ready', 1500);
      const points = await windows[0].getAttribute(`#instances > [data-name="${served}"] polyline`, 'points');
      assert.equal(points.split(' ').length, 60, 'a minute is drawn');
    });
  } finally {
    clearInterval(timer);
  }
});

test('an instance that is stopped drains, then is gone', MAY_FAIL, async () => {
  const page = await visit();
  try {
    await becomes(page, 'web3', 'ready', 5000);
    const stopped = host('stop web3');
    await becomes(page, 'web3', 'draining', 3000);
    await stopped;
    await becomes(page, 'web3', 'gone', 2000);
  } finally {
    await host('start web3');
  }
  await becomes(page, 'web3', 'ready', 5000);
});

test('three more instances appear when they start; removed, they leave the list after a minute', MAY_FAIL, async () => {
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

test('PostgreSQL is unavailable: the page shows it, and stores what was typed once it is back', MAY_FAIL, async () => {
  const [page, plain] = [await visit(), await visit(WITHOUT_SCRIPT)];
  const [waited, kept] = [`waited for PostgreSQL ${RUN}`, `kept for PostgreSQL ${RUN}`];
  let fresh;
  await whileKilled('postgres', async () => {
    await shows(page, '#trouble', 'PostgreSQL is unavailable: messages cannot be read or stored');
    await send(page, waited);
    await shows(page, '#form-trouble', 'trying again');
    await page.screenshot({ path: `${OUT}/unavailable.png` });
    await send(plain, kept);
    await shows(plain, '#form-trouble', 'Not stored: PostgreSQL is unavailable');
    await shows(plain, '#trouble', 'PostgreSQL is unavailable');
    assert.equal(await plain.inputValue('#body'), kept);
    fresh = await visit();
    assert.deepEqual(await shownIds(fresh), [], 'messages in a page made without PostgreSQL');
  });
  await shows(page, '#sent', 'Stored by');
  await shows(page, '#trouble', /^$/);
  for (const one of [page, fresh]) await catchesUp(one, waited);
});

test('Redis is unavailable: the page shows it, messages go on, and readers catch up after it', MAY_FAIL, async () => {
  const [writer, reader] = [await visit(), await visit()];
  await whileKilled('redis', async () => {
    await shows(reader, '#trouble', 'Redis is unavailable: visits are not counted');
    await becomes(reader, 'web1', 'unknown', 3000);
    await send(writer, `without Redis ${RUN}`);
    await shows(writer, '#sent', 'Stored by');
    const fresh = await visit();
    assert.equal(await fresh.textContent('#visit'), 'Not counted as a visit');
    await shows(fresh, '#trouble', 'Redis is unavailable');
  });
  await shows(reader, '#trouble', /^$/);
  await becomes(reader, 'web1', 'ready', 3000);
  await catchesUp(reader, `without Redis ${RUN}`);
});

test('no error on the console, no breach of the content security policy, in all of it', async () => {
  assert.deepEqual(faults, []);
  const policy = (await fetch(BASE + '/', { headers: { Accept: 'text/html' } })).headers.get('content-security-policy');
  for (const rule of ["default-src 'none'", "connect-src 'self'", "form-action 'self'", "frame-ancestors 'none'"])
    assert.ok(policy.includes(rule), `${rule} in ${policy}`);
  assert.ok(!policy.includes('unsafe'), policy);
});

// ---- The pictures of README.md: one story in three frames. `make pictures`, on a stack of its own.

const STORY = [
  ['Grace', 'Which of the three stored this? The name is on the right.'],
  ['Edsger', 'I sent this one twice with the same Idempotency-Key. It is here once.'],
  ['Barbara', 'Kill one of them and go on writing: no message is lost, and no request fails.'],
  ['Leslie', 'All three give the same answer, in the same order.']
];

if (process.env.STORY) test('a story in three pictures', MAY_FAIL, async () => {
  for (const [author, body] of STORY) await store(body, author);
  const pages = { light: await visit(), dark: await visit(DARK) };
  const frame = async name => {
    for (const [scheme, page] of Object.entries(pages))
      await page.screenshot({ path: `${OUT}/${name}-${scheme}.png` });
  };
  let isRunning = true;
  const client = async () => { while (isRunning) await getJson('/').catch(() => {}); };
  const clients = [client(), client()];
  await pages.light.waitForTimeout(30_000);
  await frame('story-1');
  await whileKilled('web2', async () => {
    await store('web2 was killed a few seconds ago. Did you notice?', 'Margaret');
    for (const page of Object.values(pages)) await becomes(page, 'web2', 'gone', 12_000);
    await frame('story-2');
  });
  await pages.light.waitForTimeout(12_000);
  await store('And web2 is back.', 'Ada');
  for (const page of Object.values(pages)) await isShownOnce(page, 'And web2 is back.');
  await pages.light.waitForTimeout(3000); // new messages are marked for two
  await frame('story-3');
  isRunning = false;
  await Promise.all(clients);
});

await runCases(process.env.CASE ?? '');
