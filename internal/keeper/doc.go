// Package keeper is the process that outlives the worker: it holds descriptors and bytes
// for it, starts it anew when it dies, and hands them to its successor. So what the kernel
// asks is never let go of because a program with a network, parsers and much memory died.
//
// The keeper knows nothing of what it holds, opens no connection but to the service
// manager, and reads nothing but its worker's requests, all of which may be hostile.
//
// In the keeper's process, Run is everything. In the worker's:
//
//	c, err := keeper.Connect()     // nil, nil without a keeper
//	c.StateVersion = "1"
//	held, err := c.Entries(ctx)    // what the predecessor left
//	err = c.Put(ctx, keeper.Entry{Name: "group", File: group})
//	err = c.Alive(ctx)             // and again after each c.AliveEvery()
//	err = c.Ready(ctx)
//	...
//	err = c.End(ctx)               // then exit
//
// At any time at most one living process besides the keeper has the entries: a worker gets
// them when its predecessor has been waited for. A worker survives its keeper (Gone).
//
// A service manager (NOTIFY_SOCKET) hears when the worker is ready and that the keeper is
// alive, and keeps a copy of everything (FDSTORE) for the keeper that it starts when this
// one has died; a worker that lives on is killed then (orphan.go). Its unit wants
// Type=notify, NotifyAccess=main, KillMode=process (the keeper passes signals on),
// Restart=on-failure, StartLimitIntervalSec=0 and a FileDescriptorStoreMax= of as many
// entries as there may be, and three more.
//
// Read first: Client, the worker's side, and keeper in keeper.go, whose loop is the only
// goroutine that decides anything; worker.go has the goroutines that ask it. The loop
// waits for nobody but, at most a second, for the service manager. There is no lock but
// Client.mu, which is never held while waiting.
package keeper
