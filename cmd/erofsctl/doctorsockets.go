package main

import (
	"context"
	"errors"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/api"
)

// socketTime bounds the answer at a socket.
const socketTime = 5 * time.Second

// examineSockets finds who answers.
func (d *doctor) examineSockets(ctx context.Context) {
	daemon := api.NewClient(d.at(d.daemon))
	defer daemon.Close()
	d.examineSocket(ctx, "erofsd", d.daemon, "systemctl start erofsd (or containerd-erofsd-grpc, where that starts it); journalctl says why it ended", daemon.Health)
	d.examineSocket(ctx, "snapshotter", d.snapshotter, "systemctl start containerd-erofsd-grpc; journalctl -u containerd-erofsd-grpc says why it ended",
		func(ctx context.Context) error { return dialUnix(ctx, d.at(d.snapshotter)) })
	d.examineSocket(ctx, "system API", d.system, "journalctl -u containerd-erofsd-grpc; system.address of its configuration, or --snapshotter",
		func(ctx context.Context) error { return dialUnix(ctx, d.at(d.system)) })
}

// examineSocket asks at a socket.
func (d *doctor) examineSocket(ctx context.Context, check, path, do string, ask func(context.Context) error) {
	ctx, cancel := context.WithTimeout(ctx, socketTime)
	defer cancel()
	switch err := ask(ctx); {
	case err == nil:
		d.add(fine, check, "", "answers at %s", path)
	case errors.Is(err, os.ErrNotExist):
		d.add(note, check, "", "does not run: nothing at %s", path)
	case errors.Is(err, os.ErrPermission):
		d.add(failure, check, "run this as root", "%v", err)
	case errors.Is(err, syscall.ECONNREFUSED):
		d.add(failure, check, do, "has ended: nobody answers at %s", path)
	default:
		d.add(failure, check, do, "%v", err)
	}
}

// dialUnix says why nobody answers at a socket.
func dialUnix(ctx context.Context, path string) error {
	c, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	return c.Close()
}
