// Makes the page live: follows the event stream, loads older messages, sends the form. The page works without it.
'use strict';

const $ = id => document.getElementById(id);
const sleep = millis => new Promise(done => setTimeout(done, millis));
const digits = number => number.toLocaleString('en');

/** Writes a text only if it differs, so that a screen reader announces each change once. */
function setText(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** Puts texts into a row, by class: what users wrote is text, never HTML. */
function fill(row, texts) {
  for (const name of Object.keys(texts)) setText(row.querySelector('.' + name), texts[name]);
  return row;
}

const copyRow = template => $(template).content.firstElementChild.cloneNode(true);

async function getJson(path, millis = 5000) {
  const response = await fetch(path,
    { headers: { Accept: 'application/json' }, cache: 'no-store', signal: AbortSignal.timeout(millis) });
  if (!response.ok) throw new Error(path + ': ' + response.status);
  return response.json();
}

// ---- Instances: each has a colour that follows from its name alone

/** One of 60 hues; web1, web2 and so on take up to 20, well apart. */
function hue(name) {
  const [, letters, number] = name.match(/^(.*?)([0-9]{0,4})$/s);
  const hash = [...letters].reduce((sum, letter) => Math.imul(31, sum) + letter.codePointAt(0) >>> 0, 0);
  return (hash + 21 * number) % 60 * 6;
}

/** Sets the hue for the style sheet; the security policy allows no style attribute. */
function paint(element, name) {
  element.classList.add('own');
  element.style.setProperty('--hue', hue(name));
}

/** Gives the list a row for each name, in this order; a row stays as long as its name. */
function rowsFor(list, template, names) {
  for (const row of [...list.children]) if (!names.includes(row.dataset.name)) row.remove();
  return names.map((name, i) => {
    let row = list.children[i];
    if (row?.dataset.name !== name) {
      row = list.insertBefore(fill(copyRow(template), { name }), row ?? null);
      row.dataset.name = name;
      paint(row, name);
    }
    return row;
  });
}

function showShares(list, byInstance) {
  const names = Object.keys(byInstance).sort((a, b) => a.length - b.length || (a < b ? -1 : 1));
  const total = names.reduce((sum, name) => sum + byInstance[name], 0);
  rowsFor(list, 'share', names).forEach((row, i) => {
    const visits = byInstance[names[i]], percent = (100 * visits / Math.max(1, total)).toFixed(1) + '%';
    row.querySelector('rect').setAttribute('width', percent);
    fill(row, { count: digits(visits), percent });
  });
}

function showVisits({ total, byInstance }) {
  setText($('total'), digits(total));
  showShares($('shares'), byInstance);
}

function showInstances(all) {
  const changes = [];
  rowsFor($('instances'), 'status', all.map(one => one.instance)).forEach((row, i) => {
    const { instance, state, requestsPerSecond: rate } = all[i];
    if (row.dataset.state !== state) changes.push(instance + ' is ' + state);
    row.dataset.state = state;
    row.rate = rate ?? 0;
    fill(row, { state, rate: (rate === null ? '–' : digits(rate)) + '/s' });
  });
  if (changes.length > 0) setText($('instances-news'), changes.join(', '));
}

/** Draws the last 60 seconds of each instance, all on one scale; called once a second. */
function drawRates() {
  const rows = [...$('instances').children];
  for (const row of rows) row.rates = [...row.rates ?? Array(60).fill(0), row.rate ?? 0].slice(-60);
  const max = Math.max(10, ...rows.flatMap(row => row.rates));
  for (const row of rows)
    row.querySelector('polyline').setAttribute('points',
      row.rates.map((rate, second) => second + ',' + (19 - 18 * rate / max)).join(' '));
}

// ---- Messages: by id, newest first, each once, in whatever order they arrive

const list = $('messages'), older = $('older');
const isNewest = list.dataset.cursor !== undefined; // not a page of older messages
let maxShown = 300; // keeps a page quick that is open all day
let gap = null;     // an object while the list lacks messages, or shows some that no longer exist
let arrived = [], authors = [], ownId = 0;

const idOf = item => +(item?.dataset.id ?? 0);

/** Shows the name in its colour, and the time as in the reader's country. */
function finish(item) {
  const name = item.querySelector('.name'), time = item.querySelector('time');
  paint(name, name.textContent);
  time.textContent = new Date(time.dateTime).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'medium' });
}

/** @returns the new item, or null if the list has the message already */
function insert({ id, author, body, instance, createdAt }) {
  let next = list.firstElementChild;
  while (idOf(next) > id) next = next.nextElementSibling;
  if (idOf(next) === id) return null;
  const item = fill(copyRow('message'), { author, body, name: instance });
  item.dataset.id = id;
  item.querySelector('time').dateTime = createdAt;
  finish(item);
  return list.insertBefore(item, next);
}

/** The link continues after the last message; a text that is long enough to scroll can be scrolled by keyboard. */
function listChanged() {
  older.href = '/?before=' + idOf(list.lastElementChild);
  for (const body of list.querySelectorAll('.body:not([tabindex])'))
    if (body.scrollHeight > body.clientHeight) body.tabIndex = 0;
}

/** Hundreds may arrive in a second, so they are shown together. */
function receive(message) {
  if (isNewest && arrived.push(message) === 1) setTimeout(showArrived, 100);
}

function showArrived() {
  if (gap) return; // closeGap calls this again
  const oldest = older.hidden ? 0 : idOf(list.lastElementChild); // the link brings what is older
  for (const message of arrived.splice(0)) {
    const item = message.id > oldest ? insert(message) : null;
    item?.classList.add('new');
    if (item && message.id !== ownId) announce(message.author);
  }
  for (; list.childElementCount > maxShown; older.hidden = false) list.lastElementChild.remove();
  listChanged();
}

/** Announces new messages to screen readers, at most once in 3 s. */
function announce(author) {
  if (authors.push(author) === 1) setTimeout(() => {
    setText($('news'), authors.length === 1 ? 'New message from ' + authors[0] : authors.length + ' new messages');
    authors = [];
  }, 3000);
}

function insertPage({ messages, next }) {
  messages.forEach(insert);
  older.hidden = next === null;
  listChanged();
}

async function showOlder(event) {
  event.preventDefault();
  const last = list.lastElementChild;
  const page = await getJson('/api/messages' + older.search).catch(() => null);
  if (!page) return setText($('news'), 'Older messages could not be read: try again');
  if (list.lastElementChild !== last) return; // the list has changed: this page does not continue it
  maxShown += page.messages.length;
  insertPage(page);
}

function openGap() {
  gap = {};
  arrived = []; // the newest page has these
  closeGap();
}

/** Replaces the list by what is stored now; then what arrived meanwhile follows. */
async function closeGap() {
  const current = gap;
  const page = await getJson('/api/messages' + (isNewest ? '?limit=100' : location.search)).catch(() => null);
  if (!page || gap !== current) return; // watchHealth tries again, or another call has closed the gap
  gap = null;
  list.replaceChildren();
  insertPage(page);
  showArrived();
}

// ---- The event stream: all messages after the cursor, each once. A browser opens at most six connections to a server,
// for all its windows: so one window leads, the one that holds a lock. It subscribes and broadcasts the events to the
// others. Each window keeps the cursor, and can be the next leader.

const MAX_SILENCE_MILLIS = 35_000; // two heartbeats are missing: the service sends one every 15 s
const handlers = {
  message: receive, gap: openGap, instances: showInstances, visit: showVisits, heartbeat() {}, link: showLink
};

let cursor = list.dataset.cursor ?? ''; // empty: unknown, as on a page that was made without PostgreSQL
let stream, turn; // a turn, as leader or in the queue for it, ends when the window is hidden
let channel = navigator.locks && window.BroadcastChannel ? new BroadcastChannel('events') : null; // null: all lead
let lastEvent; // by the clock, since timers stand still while a computer sleeps
const latest = new Map(); // by type: the state that the leader gives to a window that joins

function showLink(state) {
  $('link').dataset.state = state;
  setText($('link'), state === 'live' ? state : state + '…');
}

/** Joins, or begins anew. With `steal`, the leader is replaced, since no event arrives from it. */
function follow(steal = false) {
  turn?.abort();
  turn = new AbortController();
  const { signal } = turn;
  lastEvent = Date.now();
  showLink(steal ? 'reconnecting' : 'connecting');
  if (document.hidden) return; // the connection is for windows that are visible
  if (!channel) return lead(signal);
  navigator.locks.request('events', steal ? { steal } : { signal }, () => lead(signal)).catch(error => {
    if (signal.aborted) return;
    if (error.name !== 'AbortError') { // not stolen: the browser refuses locks to this page
      channel?.close();
      channel = null;
    }
    follow();
  });
  channel.postMessage({ type: 'hello' });
}

/** @returns a promise that lasts as long as the turn, and so keeps the lock */
function lead(signal) {
  if (signal.aborted) return null;
  stream = new EventSource('/api/events' + (cursor && '?after=' + cursor));
  for (const type of Object.keys(handlers))
    stream.addEventListener(type, ({ data, lastEventId }) => publish(type, JSON.parse(data), lastEventId || cursor));
  stream.onopen = () => publish('link', 'live');
  stream.onerror = () => {
    publish('link', 'reconnecting');
    if (stream.readyState === EventSource.CLOSED) // refused: the browser does not try again
      setTimeout(() => signal.aborted || follow(true), 1000);
  };
  return new Promise(done => signal.onabort = () => {
    stream.close();
    latest.clear();
    done();
  });
}

/** Gives an event to all windows. By `after`, a window sees whether it has missed one. */
function publish(type, data, newCursor = cursor) {
  const event = { type, data, after: cursor, cursor: newCursor };
  if (type !== 'message' && type !== 'gap') latest.set(type, data);
  channel?.postMessage(event);
  take(event);
}

function take(event) {
  lastEvent = Date.now();
  if (event.after !== cursor || event.data === 'live' && !cursor) openGap(); // (without a cursor, any may be missing)
  cursor = event.cursor;
  handlers[event.type](event.data);
}

if (channel) channel.onmessage = ({ data: event }) => {
  if (event.type !== 'hello') take(event);
  else latest.forEach((data, type) => channel.postMessage({ type, data, after: cursor, cursor }));
};

/** A sleep, another network or a proxy can end a stream without an error; a clock can be set back. */
function endSilence() {
  if (!document.hidden && Math.abs(Date.now() - lastEvent) > MAX_SILENCE_MILLIS) follow(true);
}

/** Polls the service's health, more often while something is wrong, so that a recovery is soon visible. */
async function watchHealth() {
  for (let isBroken = false; ; await sleep(isBroken ? 1000 : 5000)) {
    if (document.hidden) continue;
    const { dependencies } = await fetch('/readyz', { cache: 'no-store', signal: AbortSignal.timeout(4000) })
      .then(response => response.json()).catch(() => ({ dependencies: { service: 'down' } }));
    const notices = [...$('trouble').children];
    for (const notice of notices) notice.hidden = dependencies[notice.dataset.part] !== 'down';
    if (gap) await closeGap();
    isBroken = gap || $('link').dataset.state !== 'live' || notices.some(notice => !notice.hidden);
  }
}

// ---- Load balancing

function showAnswer({ instance, visits }) {
  paint($('answer'), instance);
  $('instance').classList.toggle('long', instance.length > 9);
  setText($('instance'), instance);
  setText($('visit'), visits === null ? 'Not counted as a visit' : 'Visit ' + digits(visits));
  setText($('news'), 'Answered by ' + instance);
  document.title = instance + ' · Threefold';
}

function askAgain(event) {
  event.preventDefault();
  getJson('/').then(showAnswer, () => setText($('visit'), 'No response: try again'));
}

/** A cell has letters too, since not all people can tell colours apart. Without an instance, the request failed. */
function drawCell(instance) {
  const cell = $('cells').appendChild(document.createElement('i'));
  if (instance) paint(cell, instance);
  cell.textContent = instance ? (instance.match(/[0-9]+$/)?.[0] ?? instance).slice(-2) : '×';
}

const median = numbers => numbers.sort((a, b) => a - b)[numbers.length >> 1].toFixed(1);

async function sendMany() {
  if ($('send90').ariaDisabled === 'true') return;
  $('send90').ariaDisabled = 'true';
  $('cells').replaceChildren();
  setText($('summary'), '');
  const byInstance = {}, millis = {};
  let sent = 0;
  const sender = async () => {
    while (sent++ < 90) {
      const start = performance.now();
      const instance = await getJson('/', 15_000).then(answer => answer.instance, () => null);
      drawCell(instance);
      if (instance) {
        (millis[instance] ??= []).push(performance.now() - start);
        byInstance[instance] = millis[instance].length;
      }
      showShares($('answers'), byInstance);
    }
  };
  await Promise.all([sender(), sender(), sender(), sender()]);
  const failed = $('cells').querySelectorAll(':not(.own)').length;
  const medians = [...$('answers').children].map(({ dataset: { name } }) => `${name} ${median(millis[name])} ms`);
  setText($('summary'), (failed ? failed + ' of 90 failed' : 'All 90 answered')
    + (medians.length ? '. Median response time: ' + medians.join(', ') : ''));
  $('cells').ariaLabel = $('summary').textContent;
  $('send90').ariaDisabled = 'false';
}

// ---- The form: one idempotency key for one text, however often it has to be sent

const fields = [$('author'), $('body')];
let attempt = {}; // draft and key

function showError(field, text) {
  setText($(field.id + '-error'), text);
  field.ariaInvalid = text ? 'true' : null;
}

/** Without outer white space: Unicode's White_Space, the same in the service. (`trim` and `\s` mean another set.) */
const stripped = text => text.match(/\P{White_Space}(.*\P{White_Space})?/su)?.[0] ?? '';

/** Counts code points, as the service does. */
function showLength(field) {
  const length = [...stripped(field.value)].length, max = +field.dataset.max;
  setText($(field.id + '-limit'), digits(length) + ' of ' + digits(max) + ' characters');
  showError(field, length > max ? 'Too long by ' + digits(length - max) : '');
}

function setSending(sending) {
  $('send').ariaDisabled = String(sending);
  for (const field of fields) field.readOnly = sending;
  $('stop').hidden = !sending;
}

/** @returns the message, or a problem, or null if the user stopped it */
async function sendUntilAnswered() {
  const stopped = new Promise(done => $('stop').onclick = () => done(true));
  for (let tries = 1; ; tries++) {
    const response = await fetch('/api/messages', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json', 'Idempotency-Key': attempt.key },
      body: attempt.draft,
      signal: AbortSignal.timeout(5000)
    }).catch(() => null);
    const answer = await response?.json() // a response that broke off counts as none
      .catch(() => response.ok ? null : { detail: 'error ' + response.status });
    if (answer && ![429, 502, 503, 504].includes(response.status)) return answer;
    setText($('form-trouble'), 'No response yet: trying again… (' + (tries + 1) + ')');
    if (await Promise.race([stopped, sleep(Math.min(5000, 250 * 2 ** tries))])) return null;
  }
}

async function post(event) {
  event.preventDefault();
  if ($('send').ariaDisabled === 'true') return;
  const draft = JSON.stringify({ author: $('author').value, body: $('body').value });
  if (attempt.draft !== draft) attempt = { draft, key: crypto.getRandomValues(new Uint32Array(4)).join('-') };
  setText($('sent'), '');
  setText($('form-trouble'), '');
  setSending(true);
  const answer = await sendUntilAnswered();
  setSending(false);
  if (answer) showOutcome(answer);
  else setText($('form-trouble'), 'Perhaps not stored. Send it again unchanged: it will not be stored twice.');
}

function showOutcome(answer) {
  const { id, instance, errors, detail } = answer;
  for (const field of fields) showError(field, errors?.[field.id] ?? '');
  setText($('form-trouble'), id || errors ? '' : 'Not stored: ' + detail);
  if (!id) return $(errors?.author ? 'author' : 'body').focus();
  setText($('sent'), 'Stored by ' + instance);
  attempt = {};
  $('body').value = '';
  showLength($('body'));
  ownId = id;
  receive(answer);
}

// ---- Start

for (const one of document.querySelectorAll('[data-name]')) paint(one, one.dataset.name);
for (const item of list.children) finish(item);
$('icon').href = $('icon').href.replace(/hsl\([0-9]+,[0-9]+/, 'hsl(' + hue($('instance').textContent) + ',65');
if (location.pathname !== '/') history.replaceState(null, '', '/'); // a reload must not send the form again
listChanged();
$('try').hidden = false;
$('write').addEventListener('input', event => showLength(event.target));
$('write').addEventListener('submit', post);
$('send90').addEventListener('click', sendMany);
$('again').addEventListener('click', askAgain);
older.addEventListener('click', showOlder);
document.addEventListener('visibilitychange', () => follow());
window.addEventListener('online', () => follow()); // another network
window.addEventListener('pageshow', event => event.persisted && follow()); // by the browser's "back"
setInterval(drawRates, 1000);
setInterval(endSilence, 1000);
follow();
watchHealth();
