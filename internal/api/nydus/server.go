package nydus

import (
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"
)

// MaxConnections is how many connections a [Server] has at a time. Clients that leak
// theirs get an answer to the next one that says so.
const MaxConnections = 1024

// tooMany is what a connection above the limit gets: nydusd's words.
const tooMany = `{ "error": "Too many open connections" }`

// Server returns a server of h that never closes an idle connection, not even one that
// has not sent a byte: clients keep one, and take its end for the daemon's death.
// Shutdown closes them all at once. What goes wrong with a connection is logged to log.
func Server(h http.Handler, log *slog.Logger) *http.Server {
	c := &connections{silent: map[net.Conn]struct{}{}}
	srv := &http.Server{
		// No ReadHeaderTimeout and no IdleTimeout, see above.
		Handler:                      h,
		ErrorLog:                     slog.NewLogLogger(log.Handler(), slog.LevelWarn),
		DisableGeneralOptionsHandler: true, // OPTIONS * is no path of ours
		ConnState:                    c.changed,
	}
	// Shutdown alone waits five seconds for a first request.
	srv.RegisterOnShutdown(c.closeSilent)
	return srv
}

// connections are those of a server.
type connections struct {
	mu     sync.Mutex // guards what follows
	open   int
	silent map[net.Conn]struct{} // without a byte so far
}

// changed is called by the server when a connection comes, moves on or goes.
func (c *connections) changed(conn net.Conn, s http.ConnState) {
	c.mu.Lock()
	if s == http.StateNew {
		c.open++
		c.silent[conn] = struct{}{}
	} else {
		delete(c.silent, conn)
	}
	if s == http.StateClosed || s == http.StateHijacked {
		c.open--
	}
	full := s == http.StateNew && c.open > MaxConnections
	c.mu.Unlock()
	if full {
		refuse(conn)
	}
}

func (c *connections) closeSilent() {
	c.mu.Lock()
	defer c.mu.Unlock()
	for conn := range c.silent {
		_ = conn.Close() // the server closes it again
	}
}

// refuse answers a connection before it asked, and closes it.
func refuse(c net.Conn) {
	// It is new: what goes into the socket's empty buffer does not wait. The deadline
	// is for the case that it does, since nobody is accepted meanwhile.
	_ = c.SetWriteDeadline(time.Now().Add(time.Second))
	_, _ = c.Write([]byte("HTTP/1.1 503 \r\nServer: Nydus API\r\nConnection: close\r\n" +
		"Content-Type: application/json\r\nContent-Length: " + strconv.Itoa(len(tooMany)) + "\r\n\r\n" + tooMany))
	_ = c.Close() // the server closes it again
}
