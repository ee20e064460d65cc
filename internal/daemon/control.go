package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sys/unix"

	"github.com/erofsd/erofsd/internal/api"
	"github.com/erofsd/erofsd/internal/api/nydus"
	"github.com/erofsd/erofsd/internal/config"
)

// NydusdOptions are what nydusd has on its command line for its API.
type NydusdOptions struct {
	ID         string // reported by the API; "": none
	Supervisor string // unix socket of who keeps our state; "": nobody does
	Upgrade    bool   // wait for a takeover before anything else
	// Entries are bound before the kernel is served.
	Entries []config.BlobEntry `json:"-"`
	// Level and SetLevel read and change the least level that is logged. Nil: it stays.
	SetLevel func(level string) error `json:"-"`
	// Adjust changes what images are told before it is used: what the command line and
	// the environment add. Nil: nothing.
	Adjust func(*config.Image) `json:"-"`
	// Metrics is a TCP address of /metrics beside the socket's. "": none.
	Metrics string
}

// A Control is a daemon with its API: it has nydusd's states. Without a takeover its
// Daemon is there from the beginning; else it comes with Start.
type Control struct {
	o   Options
	log *slog.Logger

	quit  context.CancelFunc // ends Run
	hurry context.CancelFunc // and does not wait for images that are in use

	turn turn // serialises changes of the state

	mu     sync.Mutex // guards what follows
	state  nydus.State
	daemon *Daemon                      // nil before Start
	taken  *saved                       // by TakeOver, for Start
	sent   bool                         // the supervisor has our state
	values map[string]map[string]string // of SetConfig, by id
}

var _ nydus.Service = (*Control)(nil)

// NewControl prepares a daemon for o. socket is where its API will be, "" if it has none:
// a dead one there, with the device held by a supervisor, is the sign of a daemon that
// crashed, and the new one then waits to take over from it.
func NewControl(o Options, socket string) (*Control, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	var err error
	if o.confinement, err = newConfinement(o); err != nil { // before this process has anything of the kernel
		return nil, err
	}
	c := &Control{o: o, log: o.Logger, state: nydus.Init, turn: make(turn, 1), values: map[string]map[string]string{}}
	if o.Nydusd.Upgrade {
		return c, nil
	}
	if o.Device == nil {
		o.Device = o.Holder.take(heldDevice).File
	}
	d, err := New(o)
	if err != nil && o.Nydusd.Supervisor != "" && errors.Is(err, unix.EBUSY) {
		if _, stale := answered(socket); stale {
			c.log.Warn("A previous daemon crashed! Try to failover later.", "socket", socket, "err", err)
			return c, nil
		}
	}
	if err != nil {
		return nil, errors.Join(err, o.confinement.close())
	}
	c.daemon = d
	return c, nil
}

// Run serves the kernel and the API at the unix socket until ctx is done or the API says
// so; it can be called once, and closes the daemon. Incomplete images that are in use
// are served on until force is done too.
func (c *Control) Run(ctx, force context.Context, socket string) (err error) {
	defer func() { err = errors.Join(err, c.o.confinement.close()) }()
	over, end := context.WithCancel(context.WithoutCancel(ctx)) // an end that takes long is no hang
	defer end()
	ctx, c.quit = context.WithCancel(ctx)
	defer c.quit()
	force, c.hurry = context.WithCancel(force)
	defer c.hurry()
	listeners, err := c.listen(ctx, socket)
	if err == nil {
		err = c.confine(ctx, socket)
	}
	if err == nil {
		err = c.begin(ctx)
	}
	if err == nil {
		if socket != "" {
			c.log.Info("HTTP API server running at "+socket, "root", c.o.Root)
			c.log.Info("http server started")
		}
		err = c.o.Holder.ready(ctx, over, c.tryLocks)
	}
	if err == nil {
		c.watchGuard(ctx)
		err = c.serveAPI(ctx, listeners)
	} else {
		for _, l := range listeners {
			err = errors.Join(err, l.Close())
		}
	}
	c.mu.Lock()
	d, taken := c.daemon, c.taken
	c.state, c.taken = nydus.Stopped, nil
	if d != nil {
		if c.sent {
			d.handover.Store(true)
		}
	}
	c.mu.Unlock()
	if taken != nil {
		err = errors.Join(err, taken.device.Close())
	}
	if d == nil {
		return err
	}
	select {
	case <-d.yielded:
		return errors.Join(err, d.yield())
	default:
	}
	lost := d.isLost()
	if err = errors.Join(err, d.end(ctx, force)); lost {
		return err // a keeper starts another worker
	}
	return errors.Join(err, c.o.Holder.end())
}

// begin serves the kernel, if the daemon is there from the beginning.
func (c *Control) begin(ctx context.Context) error {
	if c.daemon == nil {
		return nil
	}
	for _, e := range c.o.Nydusd.Entries {
		if err := c.bindEntry(ctx, c.daemon, e); err != nil {
			return fmt.Errorf("bind image %s of the configuration: %w", e.ID, err)
		}
	}
	c.bindHeld(ctx)
	c.changed(nydus.Init, nydus.Ready, "Mount")
	if err := c.serveKernel(ctx, c.daemon); err != nil {
		return err
	}
	c.changed(nydus.Ready, nydus.Running, "Start")
	return nil
}

// serveKernel lets d begin, and ends Run when the kernel is lost.
func (c *Control) serveKernel(ctx context.Context, d *Daemon) error {
	if err := d.begin(ctx); err != nil {
		return err
	}
	c.log.Info("serving", "root", c.o.Root, "transport", d.kernel.name())
	go func() {
		select {
		case <-d.lost: // nobody answers the kernel any more: end, so that the guard does
		case <-d.yielded:
		}
		c.quit()
	}()
	return nil
}

// changed notes a change of the state.
func (c *Control) changed(from, to nydus.State, event string) {
	c.mu.Lock()
	c.state = to
	c.mu.Unlock()
	c.log.Info(fmt.Sprintf("State machine(pid=%d): from %s to %s, input [%s], output [None]", os.Getpid(), title(from), title(to), event))
}

// title is a state as nydusd's log has it.
func title(s nydus.State) string { return string(s[:1]) + strings.ToLower(string(s[1:])) }

// running returns the daemon. Before Start the error is NotReady.
func (c *Control) running() (*Daemon, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.daemon == nil {
		return nil, nydus.NotReady()
	}
	return c.daemon, nil
}

// listen opens the places where the API is to be had: the unix socket, unless it is "",
// and with Metrics the TCP address, in this order.
func (c *Control) listen(ctx context.Context, socket string) (all []net.Listener, err error) {
	if socket != "" {
		l, err := c.o.Holder.listen(ctx, socket)
		if err != nil {
			return nil, err
		}
		all = append(all, l)
	}
	if addr := c.o.Nydusd.Metrics; addr != "" {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			return all, fmt.Errorf("serve metrics: %w", err)
		}
		all = append(all, l)
	}
	return all, nil
}

// serveAPI answers the API until ctx is done. A unix socket is removed with its listener.
func (c *Control) serveAPI(ctx context.Context, listeners []net.Listener) error {
	h := nydus.Route(nydus.Handler(c), map[string]http.Handler{
		api.Prefix + "/": http.HandlerFunc(c.serveOwn),
		"/metrics":       http.HandlerFunc(c.serveMetrics),
	})
	metrics := http.NewServeMux()
	metrics.HandleFunc("GET /metrics", c.serveMetrics)
	var servers []*http.Server
	for _, l := range listeners {
		if l.Addr().Network() == "unix" {
			servers = append(servers, nydus.Server(c.adopted(h), c.log))
			continue
		}
		servers = append(servers, &http.Server{
			Handler: metrics, ReadHeaderTimeout: 10 * time.Second, WriteTimeout: time.Minute, IdleTimeout: time.Minute,
			MaxHeaderBytes: 16 << 10, ErrorLog: slog.NewLogLogger(c.log.Handler(), slog.LevelWarn),
		})
	}
	return serveAll(ctx, servers, listeners)
}

// serveAll serves until ctx is done, or one of the servers fails.
func serveAll(ctx context.Context, servers []*http.Server, listeners []net.Listener) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var wg sync.WaitGroup
	errs := make([]error, len(servers))
	for i, srv := range servers {
		wg.Go(func() {
			defer cancel()
			if err := srv.Serve(listeners[i]); !errors.Is(err, http.ErrServerClosed) {
				errs[i] = fmt.Errorf("serve API: %w", err)
			}
		})
	}
	<-ctx.Done()
	sctx, stop := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer stop()
	for _, srv := range servers {
		_ = srv.Shutdown(sctx) // past the limit requests are cut off; they can be repeated
		_ = srv.Close()
	}
	wg.Wait()
	return errors.Join(errs...)
}

// adopted is h for requests that come while a successor still takes images over: they
// wait, and do not meet half a table.
func (c *Control) adopted(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if d, err := c.running(); err == nil {
			select {
			case <-d.adopted:
			case <-r.Context().Done():
				return
			}
		}
		h.ServeHTTP(w, r)
	})
}

// serveOwn answers our own API.
func (c *Control) serveOwn(w http.ResponseWriter, r *http.Request) {
	d, err := c.running()
	if err != nil {
		http.Error(w, `{"error":"the daemon waits for a takeover or for its start"}`, http.StatusServiceUnavailable)
		return
	}
	api.Handler(d).ServeHTTP(w, r)
}

// serveMetrics answers Prometheus.
func (c *Control) serveMetrics(w http.ResponseWriter, r *http.Request) {
	d, err := c.running()
	if err != nil {
		http.Error(w, "the daemon waits for a takeover or for its start", http.StatusServiceUnavailable)
		return
	}
	promhttp.HandlerFor(d.metrics, promhttp.HandlerOpts{}).ServeHTTP(w, r)
}
