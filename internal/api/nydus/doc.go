// Package nydus is nydusd's HTTP API: its paths, types and error texts.
//
// It holds no logic: [Handler] turns requests into calls of a [Service] (the
// daemon) and answers as nydusd does, since nydus-snapshotter and operators'
// scripts match its codes, bodies and error texts. The types to read first are
// [Service] and [Error]. Where nydusd itself fails (a call that aborts it, calls
// that wait for each other, bodies in chunks refused) this one does what the
// caller meant.
//
// Package nydustest runs the same golden requests against any Service.
package nydus
