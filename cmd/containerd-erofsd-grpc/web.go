package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/http/pprof"
	"strings"
	"sync"
	"time"
)

// A web is HTTP at a listener, beside the service for containerd.
type web struct {
	name     string
	listener net.Listener
	server   *http.Server
}

// Bounds of a web.
const (
	headerTime   = 10 * time.Second
	idleTime     = time.Minute
	leaveTime    = 3 * time.Second // for answers that are under way at the end
	maxWebHeader = 16 << 10
	maxWebBody   = 1 << 20
)

func newWeb(name string, l net.Listener, h http.Handler) *web {
	h = http.MaxBytesHandler(h, maxWebBody)
	return &web{name, l, &http.Server{Handler: h, ReadHeaderTimeout: headerTime, IdleTimeout: idleTime, MaxHeaderBytes: maxWebHeader}}
}

// serve answers until ctx ends.
func (w *web) serve(ctx context.Context) error {
	left := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(left)
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), leaveTime)
		defer cancel()
		if w.server.Shutdown(ctx) != nil {
			w.server.Close() // it is the end
		}
	})
	err := w.server.Serve(w.listener)
	if !stop() {
		<-left
	}
	if errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return fmt.Errorf("serve %s: %w", w.name, err)
}

// webs are those that the configuration asks for.
type webs []*web

// openWebs opens them all, or none.
func openWebs(c config, system http.Handler, metrics http.Handler) (all webs, err error) {
	defer func() {
		if err != nil {
			all.close()
			all = nil
		}
	}()
	add := func(name, address string, open func() (net.Listener, error), h http.Handler) {
		if address == "" || err != nil {
			return
		}
		l, lerr := open()
		if lerr != nil {
			err = fmt.Errorf("%s: %w", name, lerr)
			return
		}
		all = append(all, newWeb(name, l, h))
	}
	add("system API", c.System.Address, func() (net.Listener, error) {
		return listenUnix(c.System.Address, c.System.UID, c.System.GID)
	}, system)
	add("metrics", c.Metrics.Address, func() (net.Listener, error) { return net.Listen("tcp", c.Metrics.Address) }, metrics)
	add("pprof", c.System.Pprof, func() (net.Listener, error) {
		if path, ok := strings.CutPrefix(c.System.Pprof, "unix:"); ok {
			return listenUnix(path, 0, 0)
		}
		return net.Listen("tcp", c.System.Pprof)
	}, pprofHandler())
	return all, err
}

func (all webs) close() {
	for _, w := range all {
		w.listener.Close()
	}
}

// serve answers until ctx ends. One that fails is missed, and nothing else.
func (all webs) serve(ctx context.Context, log *slog.Logger) {
	var running sync.WaitGroup
	for _, w := range all {
		running.Go(func() {
			log.Info("serves "+w.name, "address", w.listener.Addr().String())
			if err := w.serve(ctx); err != nil {
				log.Error("a service beside the snapshotter has ended", "err", err)
			}
		})
	}
	running.Wait()
}

// checkPprof wants an address that only this machine reaches: profiles tell what memory has.
func checkPprof(address string) error {
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		if !strings.HasPrefix(path, "/") || len(path) > maxSocket {
			return fmt.Errorf("%q: want unix: and an absolute path of at most %d bytes", address, maxSocket)
		}
		return nil
	}
	host, _, err := net.SplitHostPort(address)
	if err != nil {
		return fmt.Errorf("%q: want unix:/PATH or a loopback address: %w", address, err)
	}
	if ip := net.ParseIP(host); host != "localhost" && (ip == nil || !ip.IsLoopback()) {
		return fmt.Errorf("%q is open to other machines; want unix:/PATH, or 127.0.0.1:PORT", address)
	}
	return nil
}

// pprofHandler has the profiles where go tool pprof wants them.
func pprofHandler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("/debug/pprof/", pprof.Index)
	mux.HandleFunc("/debug/pprof/cmdline", pprof.Cmdline)
	mux.HandleFunc("/debug/pprof/profile", pprof.Profile)
	mux.HandleFunc("/debug/pprof/symbol", pprof.Symbol)
	mux.HandleFunc("/debug/pprof/trace", pprof.Trace)
	return mux
}
