// Package api is the control API of erofsd: plain types, a client and an HTTP
// handler over a unix socket.
//
// It holds no logic: [Handler] turns requests into calls of a [Service] (the
// daemon), [Client] does the reverse. The types to read first are
// [MountRequest] and [Status]. Errors cross the socket as one sentence;
// [Error.Status] says of which kind.
package api
