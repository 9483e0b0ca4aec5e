import js from '@eslint/js';
import globals from 'globals';

export default [
  js.configs.recommended,
  { files: ['page/*.js'], languageOptions: { sourceType: 'script', globals: globals.browser } },
  { files: ['**/*.mjs', 'tests/lint/*.js'], languageOptions: { globals: globals.node } },
  // page.mjs hands functions to the browser.
  { files: ['tests/browser/*.mjs'], languageOptions: { globals: globals.browser } },
  { ignores: ['**/node_modules/', '**/out/'] }
];
