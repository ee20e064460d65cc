package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/daemon"
)

// startTimeout bounds how long a new daemon may take until it answers.
const startTimeout = 10 * time.Second

// daemonFlags say which daemon is wanted.
type daemonFlags struct{ socket, root, transport string }

// ensureDaemon returns when a daemon answers at d's socket; with none there it
// starts one in the background.
func ensureDaemon(ctx context.Context, client *api.Client, d daemonFlags) error {
	st, err := client.Status(ctx)
	if err == nil && d.transport != daemon.Auto && st.Transport != d.transport {
		return fmt.Errorf("the daemon at %s uses %s, not %s: start another with --transport %s, another --root and another --socket",
			d.socket, st.Transport, d.transport, d.transport)
	}
	if !errors.Is(err, syscall.ECONNREFUSED) && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if os.Geteuid() != 0 {
		return fmt.Errorf("no daemon answers at %s, and starting one needs root (CAP_SYS_ADMIN): run this as root", d.socket)
	}
	log, err := startDaemon(d)
	if err != nil {
		return fmt.Errorf("start erofsd: %w", err)
	}
	defer log.Close()
	return awaitDaemon(ctx, client, log.Name())
}

// startDaemon starts erofsd, its output in a log file below root.
func startDaemon(d daemonFlags) (log *os.File, err error) {
	bin, err := daemonBinary()
	if err != nil {
		return nil, err
	}
	root, err := filepath.Abs(d.root)
	if err != nil {
		return nil, err
	}
	socket, err := filepath.Abs(d.socket)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	log, err = os.OpenFile(filepath.Join(root, "erofsd.log"), os.O_CREATE|os.O_TRUNC|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(bin, "--root", root, "--socket", socket, "--transport", d.transport)
	cmd.Dir = "/"
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // it outlives this terminal
	if err := cmd.Start(); err != nil {
		return nil, errors.Join(err, log.Close())
	}
	return log, cmd.Process.Release()
}

// daemonBinary finds erofsd: beside this program, else in PATH.
func daemonBinary() (string, error) {
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "erofsd")
		if _, err := os.Stat(beside); err == nil {
			return beside, nil
		}
	}
	return exec.LookPath("erofsd")
}

// awaitDaemon waits until the daemon answers, or shows what it logged.
func awaitDaemon(ctx context.Context, client *api.Client, logName string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		if _, err := client.Status(ctx); err == nil {
			return nil
		}
		said, _ := os.ReadFile(logName) // it may not have said anything yet
		if i := strings.LastIndex(string(said), "erofsd: "); i >= 0 {
			return errors.New(strings.TrimSpace(string(said[i:])))
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("erofsd does not answer after %s; its log is %s", startTimeout, logName)
		case <-tick.C:
		}
	}
}
