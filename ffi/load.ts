/** Loads a native library once per thread, and reports what was tried if it cannot. */
import { readFileSync } from 'node:fs';
import { nativeError } from './errors.ts';
import { candidates, explicitCandidate, LIBRARIES, type LibraryName } from './find.ts';
import { dlopen, type NativeLibrary } from './native.ts';

const loaded = new Map<LibraryName, NativeLibrary>();

/**
 * The library, loaded into this process. `major` leaves out what the driver does not support. Throws LIBRARY_NOT_FOUND with everything
 * that was tried and what to install. If a flag or variable names the file, only that is tried: a fallback would hide the mistake.
 */
export function loadLibrary(name: LibraryName, major?: number): NativeLibrary {
  const known = loaded.get(name);
  if (known) return known;
  const explicit = explicitCandidate(name);
  const tried: string[] = [];
  for (const { path, source } of explicit ? [explicit] : candidates(name, major)) {
    try {
      const library = dlopen(path);
      loaded.set(name, library);
      return library;
    } catch (error) {
      const reason =
        error instanceof Error ? error.message.replace(/^Failed to load shared library: /, '') : '';
      tried.push(`${path} (${source}): ${reason}`);
    }
  }
  throw nativeError(
    'LIBRARY_NOT_FOUND',
    `cannot load ${LIBRARIES[name].title}; tried ${tried.join('; ')}. To fix it: ${LIBRARIES[name].install}, or set ${LIBRARIES[name].env[0]} to the file`,
    { library: name },
  );
}

/** The file behind a loaded library, as the kernel maps it; the name given to the loader if that cannot be found out. */
export function libraryFile(library: NativeLibrary): string {
  if (library.path.includes('/')) return library.path;
  try {
    const stem = library.path.replace(/\.so.*$/, '.so');
    for (const line of readFileSync('/proc/self/maps', 'utf8').split('\n')) {
      const file = line.slice(line.indexOf('/'));
      if (line.includes('/') && (file.split('/').at(-1) ?? '').startsWith(stem)) return file;
    }
  } catch {
    // no /proc: the name must do
  }
  return library.path;
}
