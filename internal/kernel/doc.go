// Package kernel says what the running kernel can do.
//
// Features are probed, never derived from a version: distributions backport
// and configure as they like. Versions appear in messages only, where they tell
// the reader which of several causes is the likely one.
//
// A probe has three outcomes. It returns nil when the feature works, an error
// that is [ErrNotSupported] when the kernel certainly lacks it, and any other
// error when it could not tell: no privilege, no descriptors, no space. Only
// the first two last, so [NewFeatureTest] remembers only them.
//
// The package never loads modules and never changes a setting.
//
// Read first: [UnsupportedError], [NewFeatureTest].
package kernel
