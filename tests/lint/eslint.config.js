import js from '@eslint/js';
import globals from 'globals';

export default [
  js.configs.recommended,
  { files: ['page/*.js'], languageOptions: { sourceType: 'script', globals: globals.browser } },
  { files: ['**/*.mjs', 'tests/lint/*.js'], languageOptions: { globals: globals.node } },
  { ignores: ['**/node_modules/', '**/out/'] }
];
