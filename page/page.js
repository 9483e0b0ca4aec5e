// Makes the page live: follows the events, shows more messages, sends the form. Without it the page works too.
'use strict';

const $ = id => document.getElementById(id);
const sleep = millis => new Promise(done => setTimeout(done, millis));
const digits = number => number.toLocaleString('en');

/** Changes a text only if it differs: a screen reader is told what is new, once. */
function say(element, text) {
  if (element.textContent !== text) element.textContent = text;
}

/** A copy of the row in a template. What users wrote is put in as text, never as HTML. */
const blank = name => $(name).content.firstElementChild.cloneNode(true);

async function getJson(path, millis = 5000) {
  const response = await fetch(path,
    { headers: { Accept: 'application/json' }, cache: 'no-store', signal: AbortSignal.timeout(millis) });
  if (!response.ok) throw new Error(path + ': ' + response.status);
  return response.json();
}

// ---- instances: each has a colour of its own, worked out from its name alone, here and nowhere else

/** One of 60 hues, the same at each visit: web1, web2 and so on take up to 20, well apart. */
function hue(name) {
  const number = name.match(/[0-9]{0,4}$/)[0];
  let sum = 0;
  for (const letter of name.slice(0, name.length - number.length))
    sum = Math.imul(31, sum) + letter.charCodeAt(0) | 0;
  return ((sum + 21 * number) % 60 + 60) % 60 * 6;
}

/** The style sheet does the rest. Set by script, since the policy allows no style attribute. */
function paint(element, name) {
  element.classList.add('own');
  element.style.setProperty('--hue', hue(name));
}

/** Makes the list have a row for each name, in this order, and nothing else; a row stays as long as its name. */
function nameRows(list, template, names) {
  for (const row of [...list.children]) if (!names.includes(row.dataset.name)) row.remove();
  return names.map((name, i) => {
    let row = list.children[i];
    if (row?.dataset.name !== name) {
      row = list.insertBefore(blank(template), row ?? null);
      row.dataset.name = row.querySelector('.name').textContent = name;
      paint(row, name);
    }
    return row;
  });
}

function drawShares(list, byInstance) {
  const names = Object.keys(byInstance).sort((a, b) => a.length - b.length || (a < b ? -1 : 1));
  const total = names.reduce((sum, name) => sum + byInstance[name], 0);
  nameRows(list, 'share', names).forEach((row, i) => {
    const name = names[i];
    const percent = (100 * byInstance[name] / Math.max(1, total)).toFixed(1) + '%';
    row.querySelector('rect').setAttribute('width', percent);
    say(row.querySelector('.count'), digits(byInstance[name]));
    say(row.querySelector('.percent'), percent);
  });
}

function showVisits({ total, byInstance }) {
  say($('total'), digits(total));
  drawShares($('shares'), byInstance);
}

// Who is here. What each did in the last minute is drawn once a second, from what it said last.

let present = [];
const past = new Map(); // by name: requests in each of the last 60 seconds

function showInstances(all) {
  const before = new Map(present.map(one => [one.instance, one.state]));
  present = all;
  nameRows($('instances'), 'presence', all.map(one => one.instance)).forEach((row, i) => {
    row.dataset.state = all[i].state;
    say(row.querySelector('.state'), all[i].state);
    const rate = all[i].requestsPerSecond;
    say(row.querySelector('.rate'), (rate === null ? '\u2013' : digits(rate)) + '/s');
  });
  const changed = all.filter(one => before.size > 0 && before.get(one.instance) !== one.state);
  if (changed.length > 0) say($('instances-news'), changed.map(one => one.instance + ' is ' + one.state).join(', '));
}

function drawPast() {
  for (const name of past.keys()) if (!present.some(one => one.instance === name)) past.delete(name);
  for (const { instance, requestsPerSecond } of present) {
    const rates = [...past.get(instance) ?? Array(60).fill(0), requestsPerSecond ?? 0].slice(-60);
    past.set(instance, rates);
  }
  const most = Math.max(10, ...[...past.values()].flat()); // one scale for all
  for (const row of $('instances').children)
    row.querySelector('polyline').setAttribute('points',
      (past.get(row.dataset.name) ?? []).map((rate, second) => second + ',' + (19 - 18 * rate / most)).join(' '));
}

const readVisits = () => getJson('/api/visits').then(showVisits, () => {}); // the list of troubles tells of Redis

// ---- messages: kept in the order of their ids, each once, however often and in whatever order they come

const list = $('messages');
const known = new Map([...list.children].map(item => [+item.dataset.id, item]));
let mostShown = 300; // a page that is left open all day has to stay quick
let olderExist = !$('older').hidden;
const isNewest = list.dataset.cursor !== undefined; // not a page of older messages
let gaps = 0, closedGaps = 0; // how often messages were left out, or are no more; how many of these are made up for

const oldest = () => +(list.lastElementChild?.dataset.id ?? 0);
const localTime = time =>
  new Date(time).toLocaleString(undefined, { dateStyle: 'medium', timeStyle: 'medium' });

/** The link goes on from the oldest; a text so long that it scrolls can be scrolled by keyboard. */
function tidy() {
  $('older').hidden = !olderExist;
  $('older').href = '/?before=' + oldest();
  for (const body of list.querySelectorAll('.body:not([tabindex])'))
    if (body.scrollHeight > body.clientHeight) body.tabIndex = 0;
}

function messageItem(message) {
  const item = blank('message');
  item.dataset.id = message.id;
  item.querySelector('.author').textContent = message.author;
  item.querySelector('.body').textContent = message.body;
  item.querySelector('.name').textContent = message.instance;
  paint(item.querySelector('.name'), message.instance);
  item.querySelector('time').dateTime = message.createdAt;
  item.querySelector('time').textContent = localTime(message.createdAt);
  return item;
}

/** @returns whether it was not here before */
function insert(message) {
  if (known.has(message.id)) return false;
  let next = list.firstElementChild;
  while (next && +next.dataset.id > message.id) next = next.nextElementSibling;
  known.set(message.id, list.insertBefore(messageItem(message), next));
  return true;
}

function removeOldest() {
  known.delete(oldest());
  list.lastElementChild.remove();
  olderExist = true;
}

// Hundreds may come in a second: they are gathered, shown together, and told of now and then.
let arrived = [], news = [], lastNews = 0, ownId = 0;

function receive(message) {
  if (isNewest && arrived.push(message) === 1) setTimeout(showArrived, 100);
}

function showArrived() {
  if (closedGaps < gaps) return; // later
  // What is older than all that is shown comes with the link to older messages.
  const added = arrived.filter(message => (!olderExist || message.id > oldest()) && insert(message));
  arrived = [];
  added.forEach(message => known.get(message.id).classList.add('new'));
  while (known.size > mostShown) removeOldest();
  tidy();
  const others = added.filter(message => message.id !== ownId);
  if (news.length === 0 && others.length > 0) setTimeout(tellNews, Math.max(0, lastNews + 5000 - Date.now()));
  news.push(...others);
}

function tellNews() {
  say($('news'), news.length === 1 ? 'New message from ' + news[0].author : news.length + ' new messages');
  news = [];
  lastNews = Date.now();
}

async function showOlder(event) {
  event.preventDefault();
  const gapsBefore = gaps;
  try {
    const page = await getJson('/api/messages' + $('older').search);
    if (gaps !== gapsBefore) return; // it need not follow what is shown now
    page.messages.forEach(insert);
    olderExist = page.next !== null;
    mostShown += page.messages.length;
    tidy();
  } catch {
    say($('news'), 'Older messages could not be read: try again');
  }
}

function openGap() {
  gaps++;
  arrived = []; // what matters of it comes with the newest page
  closeGap();
}

/** Shows what is stored now, and nothing else; what came meanwhile follows. Older ones can be asked for again. */
async function closeGap() {
  const upTo = gaps;
  const page = await getJson('/api/messages' + (isNewest ? '?limit=100' : location.search)).catch(() => null);
  if (!page || upTo < gaps || upTo === closedGaps) return; // tried again in watch; or done by another read
  closedGaps = upTo;
  known.clear();
  list.replaceChildren();
  page.messages.forEach(insert);
  olderExist = page.next !== null;
  showArrived();
}

// ---- the stream of events: it brings all that was stored after the cursor, each once. A browser opens only six
// connections to a server, for all its windows: so one of them leads, the one that holds a lock, and passes on what
// comes to those that follow. Each window keeps the cursor, and may be the next to lead.

const TYPES = ['message', 'gap', 'instances', 'visit', 'heartbeat'];
const MAX_SILENCE = 35_000; // two heartbeats are missing: the service sends one each 15 s
const LINK = { connecting: 'connecting\u2026', live: 'live', broken: 'reconnecting\u2026' };
const handlers = { message: receive, instances: showInstances, visit: showVisits, link: showLink };

let cursor = list.dataset.cursor ?? ''; // empty: not known, as on a page that was made without PostgreSQL
let stream, turn = new AbortController(); // this window's turn, to lead or to wait for it, ends when it is hidden
let channel = navigator.locks && window.BroadcastChannel ? new BroadcastChannel('events') : null; // null: each leads
let heard; // when the last event came, by two clocks: one may stand still in a sleep, the other may be set
const latest = new Map(); // by type: what is so now, for a window that comes later

function showLink(state) {
  $('link').dataset.state = state;
  say($('link'), LINK[state]);
}

/** Takes part, or begins anew. With `steal`, the window that leads is passed over: nothing comes from it. */
function follow({ steal = false, state = steal ? 'broken' : 'connecting' } = {}) {
  turn.abort();
  turn = new AbortController();
  const { signal } = turn;
  heard = [Date.now(), performance.now()];
  showLink(state);
  if (document.hidden) return; // nobody looks: the connection is for others
  if (!channel) return lead(signal, state);
  navigator.locks.request('events', steal ? { steal } : { signal }, () => lead(signal, state)).catch(error => {
    if (signal.aborted) return;
    if (error.name !== 'AbortError') { // not stolen: the browser keeps locks from this page
      channel?.close();
      channel = null;
    }
    follow();
  });
  channel.postMessage({ type: 'hello' });
}

/** @returns a promise that lasts as long as the turn, and holds the lock */
function lead(signal, state) {
  if (signal.aborted) return null;
  const source = stream = new EventSource('/api/events' + (cursor && '?after=' + cursor));
  for (const type of TYPES)
    source.addEventListener(type, ({ data, lastEventId }) => pass(type, JSON.parse(data), lastEventId || cursor));
  source.onopen = () => pass('link', 'live');
  source.onerror = () => {
    pass('link', 'broken');
    if (source.readyState === EventSource.CLOSED) // refused: the browser gave up
      setTimeout(() => signal.aborted || follow({ state: 'broken' }), 1000);
  };
  latest.clear();
  pass('link', state);
  return new Promise(done => signal.addEventListener('abort', () => {
    source.close();
    done();
  }));
}

/** Gives an event to all windows. `after` tells those that follow whether they missed one. */
function pass(type, data, newCursor = cursor) {
  const event = { type, data, after: cursor, cursor: newCursor };
  if (type !== 'message' && type !== 'gap') latest.set(type, data);
  channel?.postMessage(event);
  take(event);
}

function take(event) {
  heard = [Date.now(), performance.now()];
  const isUnknown = event.data === 'live' && !event.after; // nobody knows what the stream goes on from
  if (event.type === 'gap' || event.after !== cursor || isUnknown) openGap();
  cursor = event.cursor;
  handlers[event.type]?.(event.data);
}

if (channel) channel.onmessage = ({ data: event }) => {
  if (event.type !== 'hello') take(event);
  else if (stream && stream.readyState !== EventSource.CLOSED) latest.forEach((data, type) =>
    channel.postMessage({ type, data, after: cursor, cursor }));
};

/** A sleep, another network or a proxy can end a stream without a word. */
function endSilence() {
  if (!document.hidden && Math.max(Date.now() - heard[0], performance.now() - heard[1]) > MAX_SILENCE)
    follow({ steal: true });
}

// ---- how everything is

/** @returns the parts that are away */
async function away() {
  try {
    const response = await fetch('/readyz', { cache: 'no-store', signal: AbortSignal.timeout(4000) });
    const { dependencies } = await response.json();
    return Object.keys(dependencies).filter(name => dependencies[name] === 'down');
  } catch {
    return ['service'];
  }
}

/** Asks how everything is; more often while something is away, so that its return is soon seen. */
async function watch() {
  for (let isBroken = false; ; await sleep(isBroken ? 1000 : 5000)) {
    if (document.hidden) continue;
    const parts = await away();
    for (const notice of $('trouble').children) {
      const isAway = parts.includes(notice.dataset.part);
      if (!notice.hidden && !isAway) readVisits(); // it is back
      notice.hidden = !isAway;
    }
    if (closedGaps < gaps) await closeGap();
    isBroken = parts.length > 0 || closedGaps < gaps || $('link').dataset.state !== 'live';
  }
}

// ---- who answers

function showAnswer({ instance, visits }) {
  paint($('answer'), instance);
  $('instance').classList.toggle('long', instance.length > 9);
  say($('instance'), instance);
  say($('visit'), visits === null ? 'Not counted as a visit' : 'Visit ' + digits(visits));
  document.title = instance + ' \u00b7 Threefold';
}

async function askAgain(event) {
  event.preventDefault();
  try {
    const answer = await getJson('/');
    showAnswer(answer);
    say($('news'), 'Answered by ' + answer.instance);
  } catch {
    say($('visit'), 'Nobody answered: ask again');
  }
}

function clearCells() {
  $('cells').replaceChildren(...Array.from({ length: 90 }, () => document.createElement('i')));
}

/** Letters in each cell as well, since colours alone tell nothing to some. */
function drawCell(cell, instance) {
  if (instance) paint(cell, instance);
  else cell.className = 'failed';
  cell.textContent = instance ? (instance.match(/[0-9]+$/)?.[0] ?? instance).slice(-2) : '\u00d7';
}

async function sendMany() {
  if ($('send90').ariaDisabled === 'true') return;
  $('send90').ariaDisabled = 'true';
  clearCells();
  say($('summary'), '');
  const byInstance = {};
  let begun = 0, answered = 0, failed = 0;
  const sender = async () => {
    while (begun++ < 90) {
      const instance = await getJson('/', 15000).then(answer => answer.instance, () => null);
      drawCell($('cells').children[answered++], instance);
      if (instance) byInstance[instance] = (byInstance[instance] ?? 0) + 1;
      else failed++;
      drawShares($('answers'), byInstance);
    }
  };
  await Promise.all([sender(), sender(), sender(), sender()]);
  const parts = [...$('answers').children].map(({ dataset: { name } }) => name + ' ' + byInstance[name]);
  const words = (failed ? failed + ' of 90 failed: ' : 'All 90 answered: ') + parts.join(', ');
  $('cells').ariaLabel = words;
  say($('summary'), words);
  $('send90').ariaDisabled = 'false';
}

// ---- writing: one key for one text, however often it has to be sent

const fields = [$('author'), $('body')];
let attempt = {}, stopTrying = null;

function showError(field, words) {
  say($(field.id + '-error'), words);
  if (words) field.setAttribute('aria-invalid', 'true');
  else field.removeAttribute('aria-invalid');
}

/** Without outer white space: what Unicode calls so, as in the service. (`trim` and `\s` mean something else.) */
const stripped = text => text.match(/\P{White_Space}(.*\P{White_Space})?/su)?.[0] ?? '';

/** Counts as the service does: code points. */
function showLength(field) {
  const length = [...stripped(field.value)].length, most = +field.dataset.most;
  say($(field.id + '-limit'), digits(length) + ' of ' + digits(most) + ' characters');
  showError(field, length > most ? 'Too long by ' + digits(length - most) : '');
}

function setSending(sending) {
  $('send').ariaDisabled = String(sending);
  for (const field of fields) field.readOnly = sending;
  $('stop').hidden = !sending;
}

/** @returns the answer, or null if the service was given up on */
async function sendUntilAnswered() {
  for (let tries = 1; ; tries++) {
    const stopped = new Promise(stop => stopTrying = () => stop(true));
    const response = await fetch('/api/messages', {
      method: 'POST',
      headers: { 'Content-Type': 'application/json', 'Idempotency-Key': attempt.key },
      body: attempt.draft,
      signal: AbortSignal.timeout(5000)
    }).catch(() => null);
    const answer = await response?.json() // an answer that broke off is none
      .catch(() => response.ok ? null : { detail: 'error ' + response.status });
    if (answer && ![429, 502, 503, 504].includes(response.status)) return { isStored: response.ok, answer };
    say($('form-trouble'), 'No answer yet: trying again\u2026 (' + (tries + 1) + ')');
    if (await Promise.race([stopped, sleep(Math.min(5000, 250 * 2 ** tries))])) return null;
  }
}

async function post(event) {
  event.preventDefault();
  if ($('send').ariaDisabled === 'true') return;
  const draft = JSON.stringify({ author: $('author').value, body: $('body').value });
  if (attempt.draft !== draft)
    attempt = { draft, key: crypto.getRandomValues(new Uint32Array(4)).join('-') };
  say($('sent'), '');
  say($('form-trouble'), '');
  setSending(true);
  const said = await sendUntilAnswered();
  setSending(false);
  if (said === null)
    say($('form-trouble'), 'Not known to be stored. Send it again unchanged: it will not be stored twice.');
  else if (said.isStored) stored(said.answer);
  else refused(said.answer);
}

function stored(message) {
  attempt = {};
  ownId = message.id;
  say($('form-trouble'), '');
  say($('sent'), 'Stored by ' + message.instance);
  $('body').value = '';
  showLength($('body'));
  receive(message);
}

function refused(problem) {
  const errors = problem.errors ?? {};
  for (const field of fields) showError(field, errors[field.id] ?? '');
  say($('form-trouble'), problem.errors ? '' : 'Not stored: ' + problem.detail);
  $(errors.author ? 'author' : 'body').focus();
}

// ---- start

paint($('answer'), $('instance').textContent);
for (const row of document.querySelectorAll('[data-name]')) paint(row, row.dataset.name);
for (const name of list.querySelectorAll('.name')) paint(name, name.textContent);
for (const time of list.querySelectorAll('time')) time.textContent = localTime(time.dateTime);
$('icon').href = $('icon').href.replace(/hsl\([0-9]+,[0-9]+/, 'hsl(' + hue($('instance').textContent) + ',65');
if (location.pathname !== '/') history.replaceState(null, '', '/'); // a reload must not send the form again
for (const field of fields) {
  const error = $(field.id + '-error').textContent;
  showLength(field);
  if (error) showError(field, error);
  field.addEventListener('input', () => showLength(field));
}
tidy();
clearCells();
$('try').hidden = false;
$('write').noValidate = true; // errors beside the fields instead of the browser's bubbles
$('write').addEventListener('submit', post);
$('stop').addEventListener('click', () => stopTrying());
$('send90').addEventListener('click', sendMany);
$('again').addEventListener('click', askAgain);
$('older').addEventListener('click', showOlder);
document.addEventListener('visibilitychange', () => follow());
window.addEventListener('online', () => follow()); // another network
window.addEventListener('pageshow', event => event.persisted && follow()); // by the browser's "back"
setInterval(drawPast, 1000);
setInterval(endSilence, 1000);
follow();
watch();
