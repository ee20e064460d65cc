package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/snapshots"
	"google.golang.org/grpc"

	"github.com/erofsd/erofsd/internal/fdstore"
)

// A server is the gRPC service at a socket.
type server struct {
	grpc     *grpc.Server
	listener net.Listener
}

// listen opens the socket for containerd, unless the service manager has opened it: then
// calls wait there while there is no snapshotter.
func listen(c config, in *fdstore.Inherited, sn snapshots.Snapshotter, opts ...grpc.ServerOption) (*server, error) {
	l, err := in.Listener(c.Address)
	if err == nil && l == nil {
		l, err = listenUnix(c.Address, c.UID, c.GID)
	}
	if err != nil {
		return nil, err
	}
	opts = append(opts, grpc.WaitForHandlers(true)) // they use the snapshotter, which is closed then
	s := &server{grpc: grpc.NewServer(opts...), listener: l}
	snapshotsapi.RegisterSnapshotsServer(s.grpc, snapshotservice.FromSnapshotter(sn))
	return s, nil
}

// listenUnix opens a socket for its owner alone. One that nobody answers at is left over and
// replaced; anything else at its place is an error.
func listenUnix(address string, uid, gid int) (net.Listener, error) {
	l, err := openUnix(address)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", address, err)
	}
	if err := errors.Join(os.Chmod(address, 0o600), os.Lchown(address, uid, gid)); err != nil {
		return nil, errors.Join(fmt.Errorf("listen at %s: %w", address, err), l.Close())
	}
	return l, nil
}

func openUnix(address string) (net.Listener, error) {
	if err := os.MkdirAll(filepath.Dir(address), 0o700); err != nil {
		return nil, err
	}
	if err := removeStale(address); err != nil {
		return nil, err
	}
	return net.Listen("unix", address)
}

func removeStale(address string) error {
	st, err := os.Lstat(address)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode()&os.ModeSocket == 0 {
		return errors.New("there is something that is no socket; remove it or choose another address")
	}
	if c, err := net.DialTimeout("unix", address, time.Second); err == nil {
		c.Close()
		return errors.New("another snapshotter answers there; stop it or choose another address")
	}
	return os.Remove(address)
}

// endTime is how long calls that are under way may go on after the end was asked for.
const endTime = 10 * time.Second

// serve answers until ctx ends, and then what is under way.
func (s *server) serve(ctx context.Context) error {
	stopped := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(stopped)
		force := time.AfterFunc(endTime, s.grpc.Stop)
		defer force.Stop()
		s.grpc.GracefulStop()
	})
	err := s.grpc.Serve(s.listener)
	if !stop() {
		<-stopped
	}
	if err != nil && ctx.Err() == nil {
		return fmt.Errorf("serve containerd: %w", err)
	}
	return nil
}
