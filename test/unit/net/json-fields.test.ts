import fc from 'fast-check';
import { describe, expect, test } from 'vitest';
import { fieldsOf, withFields } from '../../../src/net/json-fields.ts';

const object = fc.dictionary(fc.string(), fc.jsonValue(), { noNullPrototype: true });
const style = fc.constantFrom(undefined, ' ', '\t', 3);
const read = (json: Uint8Array): unknown => JSON.parse(Buffer.from(json).toString('utf8'));

describe('fields of an object', () => {
  test('are those that JSON.parse finds', () => {
    fc.assert(
      fc.property(object, style, (value, space) => {
        const json = Buffer.from(JSON.stringify(value, undefined, space));
        const found = fieldsOf(json).map(({ name, valueFrom, to }) => [
          name,
          read(json.subarray(valueFrom, to)),
        ]);
        expect(found).toEqual(Object.entries(JSON.parse(json.toString('utf8')) as object));
      }),
    );
  });

  test.each([
    ['{}', []],
    [' \n{ "a" :\t1e5 , "b":null}', ['a', 'b']],
    ['\ufeff{"a":true}', ['a']],
    [String.raw`{"a\"b":"\\","\u0063":"\\\"}"}`, ['a"b', 'c']],
    ['{"a":1,"a":{"b":[{"c":"]}"}]}}', ['a', 'a']],
  ])('%j', (json, names) => {
    expect(fieldsOf(Buffer.from(json)).map(({ name }) => name)).toEqual(names);
  });
});

describe('an object with other fields', () => {
  test('is what it was, but for those', () => {
    fc.assert(
      fc.property(object, style, fc.func(fc.boolean()), fc.jsonValue(), (value, space, goes, set) => {
        const json = Buffer.from(JSON.stringify(value, undefined, space));
        const names = Object.keys(value).filter((name) => goes(name));
        const changes = new Map<string, unknown>(names.map((name) => [name, undefined]));
        changes.set('set', set);
        const kept = Object.entries(JSON.parse(json.toString('utf8')) as object);
        const expected = kept.filter(([name]) => !changes.has(name));
        const other = read(withFields(json, fieldsOf(json), changes)) as object;
        expect(Object.entries(other)).toEqual(
          expect.arrayContaining([...expected, ['set', read(Buffer.from(JSON.stringify(set)))]]),
        );
        expect(Object.keys(other)).toHaveLength(expected.length + 1);
      }),
    );
  });

  test.each([
    ['{}', '{"n":1}'],
    ['{"a":1 , "n":[2], "b":"x"}', '{"a":1,"b":"x","n":1}'],
    ['{"n":2,"a":1,  "b":"x"}', '{"a":1,  "b":"x","n":1}'],
    ['{"a":1,"n":2,"n":3}', '{"a":1,"n":1}'],
    ['{"\\u006e":2}', '{"n":1}'],
  ])('%s becomes %s', (json, other) => {
    const bytes = Buffer.from(json);
    expect(Buffer.from(withFields(bytes, fieldsOf(bytes), new Map([['n', 1]]))).toString()).toBe(other);
  });
});
