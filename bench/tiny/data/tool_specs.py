# ruff: noqa: E501 - a table: one entry a line or two
"""The tools of `tool_agentic`: what they take, how people ask for them, what they answer, how that is told.

`{name}` stands for an argument or a field of the tool's answer. A parameter's kind is a name in values.VALUES, or
`one|of|these`; every argument is said in the request, so it can be copied from there.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tool:
    """One tool.

    Attributes:
        parameters: name -> kind.
        requests: ways to ask; each names every parameter.
        answer: field of the tool's JSON answer -> kind.
        reports: ways to tell the answer.
    """

    name: str
    description: str
    parameters: dict[str, str]
    requests: tuple[str, ...]
    answer: dict[str, str]
    reports: tuple[str, ...]


def _tool(line: str, parameters: str, requests: str, answer: str, reports: str) -> Tool:
    name, description = line.split(": ", 1)
    split = (dict(pair.split(":") for pair in text.split()) for text in (parameters, answer))
    takes, gives = split
    return Tool(name, description, takes, tuple(requests.split(" / ")), gives, tuple(reports.split(" / ")))


TOOLS = (
    _tool("get_weather: Get the weather of a city on a day.", "city:city day:date",
          "What will the weather be like in {city} on {day}? / Weather for {city}, {day} please. / Will I need a coat in {city} on {day}?",
          "sky:sunny|cloudy|rainy|windy|foggy|snowy celsius:small", "It will be {sky} in {city} on {day}, with {celsius} degrees. / {city} on {day}: {sky}, {celsius} degrees."),
    _tool("send_email: Send an e-mail.", "to:email subject:phrase",
          "Send an email to {to} about the {subject}. / Please write to {to}, subject: {subject}. / Mail {to} regarding the {subject}.",
          "status:sent|queued message_id:code", "The email to {to} is {status} (id {message_id}). / Done: your message about the {subject} is {status} as {message_id}."),
    _tool("create_event: Put an event into the calendar.", "title:phrase date:date time:time",
          "Put the {title} in my calendar on {date} at {time}. / Schedule {title} for {date}, {time}. / I have a {title} on {date} at {time}, please note it.",
          "event_id:code", "The {title} is in your calendar on {date} at {time} (event {event_id}). / Scheduled as {event_id}: {title}, {date} at {time}."),
    _tool("convert_currency: Convert an amount of money.", "amount:large source:currency target:currency",
          "How much is {amount} {source} in {target}? / Convert {amount} {source} to {target}. / I have {amount} {source}, what is that in {target}?",
          "converted:large", "{amount} {source} are {converted} {target}. / That is {converted} {target}."),
    _tool("search_flights: Find the cheapest flight.", "origin:city destination:city date:date",
          "Find a flight from {origin} to {destination} on {date}. / I need to fly from {origin} to {destination} on {date}. / Cheapest flight {origin} to {destination}, {date}?",
          "flight:code departure:time price:number", "Flight {flight} leaves {origin} at {departure} and costs {price} dollars. / The cheapest is {flight} at {departure} for {price} dollars."),
    _tool("track_parcel: Say where a parcel is.", "parcel:code",
          "Where is my parcel {parcel}? / Track {parcel} for me. / Has {parcel} arrived yet?",
          "city:city status:delivered|delayed|shipped|waiting", "Parcel {parcel} is {status} in {city}. / {parcel}: {status}, last seen in {city}."),
    _tool("set_alarm: Set an alarm clock.", "time:time label:noun",
          "Wake me at {time} for the {label}. / Set an alarm for {time} called {label}. / Alarm at {time}, label {label}.",
          "alarm_id:number", "The alarm for the {label} is set at {time} (number {alarm_id}). / Alarm {alarm_id} will ring at {time}."),
    _tool("set_light: Change the light in a room.", "room:room percent:percent",
          "Set the {room} light to {percent} percent. / Dim the light in the {room} to {percent}%. / Make the {room} {percent} percent bright.",
          "watts:small", "The {room} light is at {percent} percent and uses {watts} watts. / Done: {room}, {percent} percent, {watts} watts."),
    _tool("set_temperature: Set the heating of a room.", "room:room celsius:small until:time",
          "Heat the {room} to {celsius} degrees until {until}. / Keep the {room} at {celsius} degrees till {until}. / {room} heating: {celsius} degrees until {until}.",
          "minutes:small", "The {room} will reach {celsius} degrees in {minutes} minutes and stay so until {until}. / Heating the {room} to {celsius} degrees takes {minutes} minutes."),
    _tool("book_table: Reserve a table in a restaurant.", "restaurant:noun people:small date:date time:time",
          "Book a table for {people} at the {restaurant} on {date} at {time}. / Reserve {people} seats at {restaurant}, {date}, {time}.",
          "booking:code", "A table for {people} at the {restaurant} is booked on {date} at {time}: {booking}. / Your booking is {booking}."),
    _tool("get_stock_price: Get the price of a share.", "symbol:symbol",
          "What is {symbol} trading at? / Price of {symbol} shares? / How much is one share of {symbol}?",
          "price:number change:up|down", "{symbol} is at {price} dollars, {change} from yesterday. / One share of {symbol} costs {price} dollars ({change})."),
    _tool("translate_text: Translate a text.", "text:phrase language:language",
          "How do you say {text} in {language}? / Translate {text} to {language}. / What is the {language} for {text}?",
          "translation_id:code characters:small", "The {language} translation of {text} is stored as {translation_id}, {characters} characters long. / See {translation_id} for {text} in {language}."),
    _tool("find_contact: Look up a person's telephone number and address.", "name:person",
          "What is the phone number of {name}? / Look up {name}. / How can I reach {name}?",
          "phone:phone city:city", "{name} lives in {city} and can be reached at {phone}. / The number of {name} in {city} is {phone}."),
    _tool("call_phone: Start a telephone call.", "number:phone",
          "Call {number}. / Please dial {number}. / Ring {number} for me.",
          "call_id:code state:ringing|busy|connected", "The call to {number} is {state} ({call_id}). / {number} is {state}."),
    _tool("play_music: Play music in a room.", "genre:genre room:room volume:percent",
          "Play some {genre} in the {room} at volume {volume}. / Put on {genre} music in the {room}, volume {volume}.",
          "track:phrase", "Now playing {track} in the {room} at volume {volume}. / The {room} plays {genre}: {track}."),
    _tool("add_to_list: Add an item to a shopping list.", "item:phrase quantity:small",
          "Add {quantity} of {item} to my shopping list. / Put {item} on the list, {quantity} pieces. / I need to buy {quantity} times {item}.",
          "items_on_list:small", "{item} is on the list, which now has {items_on_list} items. / Added {quantity} of {item}; {items_on_list} items in all."),
    _tool("read_file: Read the first line of a file.", "path:path",
          "What is in {path}? / Show me the first line of {path}. / Open {path}.",
          "line:phrase bytes:large", "The first line of {path} is: {line} (the file has {bytes} bytes). / {path} starts with: {line}"),
    _tool("write_file: Write one line to a file.", "path:path line:phrase",
          "Write the line {line} to {path}. / Save {line} in {path}. / Put {line} into the file {path}.",
          "bytes:number", "{bytes} bytes are written to {path}. / Saved: {path} now has {bytes} bytes."),
    _tool("count_words: Count the words of a file.", "path:path minimum_length:small",
          "How many words of at least {minimum_length} letters are in {path}? / Count the words in {path} that have {minimum_length} letters or more.",
          "words:large", "{path} has {words} words of at least {minimum_length} letters. / There are {words}."),
    _tool("query_orders: List the orders of a customer since a day.", "customer:person since:date",
          "How many orders has {customer} placed since {since}? / Orders of {customer} since {since}? / Show what {customer} ordered after {since}.",
          "orders:small total:large", "{customer} has placed {orders} orders since {since}, {total} dollars in all. / {orders} orders for {total} dollars."),
    _tool("refund_order: Pay back part of an order.", "order:code amount:number",
          "Refund {amount} dollars of order {order}. / Give back {amount} dollars for {order}. / Order {order} needs a refund of {amount} dollars.",
          "refund_id:code", "{amount} dollars of {order} are refunded as {refund_id}. / Refund {refund_id} is on its way."),
    _tool("open_ticket: Open a support ticket.", "title:phrase priority:low|normal|high",
          "Open a ticket with {priority} priority: {title}. / Report a problem with the {title}, priority {priority}. / New {priority} priority ticket about the {title}.",
          "ticket:code assignee:person", "Ticket {ticket} about the {title} is opened for {assignee}. / {assignee} takes care of it in {ticket}."),
    _tool("close_ticket: Close a support ticket.", "ticket:code reason:fixed|duplicate|rejected",
          "Close ticket {ticket} as {reason}. / {ticket} is {reason}, close it. / Please mark {ticket} as {reason} and close it.",
          "closed_at:time", "Ticket {ticket} was closed as {reason} at {closed_at}. / Closed at {closed_at}."),
    _tool("get_route: Find the way between two cities.", "start:city end:city mode:car|train|bicycle",
          "How do I get from {start} to {end} by {mode}? / Route from {start} to {end} by {mode}, please. / I want to go by {mode} from {start} to {end}.",
          "kilometers:number hours:small", "From {start} to {end} by {mode} it is {kilometers} kilometers, about {hours} hours. / {kilometers} kilometers in {hours} hours."),
    _tool("book_hotel: Book a hotel room.", "city:city checkin:date nights:small",
          "Book a hotel in {city} from {checkin} for {nights} nights. / I need a room in {city} on {checkin} for {nights} nights.",
          "hotel:phrase booking:code price:number", "Your room in {city} is at the {hotel}, {price} dollars a night, booking {booking}. / {booking}: {hotel}, {price} dollars."),
    _tool("create_user: Create a user account.", "name:person email:email role:admin|editor|reader",
          "Create an account for {name} ({email}) as {role}. / Add {name} with {email}, role {role}. / New {role} account: {name}, {email}.",
          "user_id:large", "The account of {name} has the number {user_id} and the role {role}. / User {user_id} is created for {email}."),
    _tool("get_inventory: Count what is in stock.", "item:phrase warehouse:city",
          "How many of the {item} are in stock in {warehouse}? / Stock of {item} in {warehouse}? / Check the {warehouse} warehouse for {item}.",
          "count:number shelf:code", "There are {count} of {item} in {warehouse}, on shelf {shelf}. / {count}, on shelf {shelf}."),
    _tool("roll_dice: Roll dice.", "count:number sides:number",
          "Roll {count} dice with {sides} sides. / Throw {count} dice of {sides} sides each.",
          "sum:number", "The sum of the {count} dice is {sum}. / You rolled {sum}."),
    _tool("set_reminder: Remind someone of something.", "person:first text:phrase day:day time:time",
          "Remind {person} of the {text} on {day} at {time}. / {person} must not forget the {text}, {day} {time}; set a reminder.",
          "reminder:number", "Reminder {reminder}: {person} will hear of the {text} on {day} at {time}. / {person} will be reminded ({reminder})."),
    _tool("get_timetable: Find the next train.", "station:city direction:city after:time",
          "When is the next train from {station} to {direction} after {after}? / Next train to {direction} from {station} after {after}?",
          "train:code departure:time platform:small", "Train {train} to {direction} leaves at {departure} from platform {platform}. / At {departure}, platform {platform}: {train}."),
)  # fmt: skip
"""Every tool that a developer message may declare."""
